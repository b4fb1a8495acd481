"""The expert block for many tokens in compiled code, forward and backward, in float32 and bfloat16 (AVX512)."""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from moekit.kernels.library import ExpertBlock, kernels, library
from moekit.tensors import Float, Int, Tensor

LANES = 16
"""Widths must be multiples of it."""

GROUP = 32 << 20
"""Bytes of rows after which the results of experts are added up, while those of the next ones are computed: the more,
the seldomer the sums are met, but the more memory they take. Writing to new memory takes ten times as long as to
old."""

NARROW = 128
"""Bytes of a row of one matrix's hidden values up to which rows may be added up as they are computed."""

MANY = 4
"""Rows for each number of the inner width from which on this is faster, on average over the experts."""

NUMBERS = {torch.float32: 32, torch.bfloat16: 16}


class Rows(NamedTuple):
    """Rows sorted by expert: `bounds[e]:bounds[e + 1]` are for expert e; `places` names those of each token (R: none),
    `weights` are these places'.

    Those of an expert are in the order of their tokens. Experts `groups[g]:groups[g + 1]` are computed before those of
    the next group, during which their rows are added up; unless the block `scatters`.
    """

    bounds: tuple[int, ...]
    tokens: Int[Tensor, " R"]
    places: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    groups: tuple[int, ...]
    scatters: bool


class Kept(NamedTuple):
    """What `backward` needs of `forward`: gate and up of each row, group by group, and its weight (0 for padding)."""

    hidden: list[Tensor]
    weights: Float[Tensor, " R"]


class Gradients(NamedTuple):
    """Of the tokens, of each place's weight, and of the stacks."""

    x: Float[Tensor, "T D"]
    weights: Float[Tensor, "T K"]
    gate_up: Float[Tensor, "E twoI D"]
    down: Float[Tensor, "E D I"]


def computes(x: Float[Tensor, "*shape D"], inner: int) -> bool:
    """Whether tokens of this type, device and width, and experts of this inner width, are for the compiled code."""
    fits = x.dtype in NUMBERS and x.device.type == "cpu" and x.shape[-1] % LANES == inner % LANES == 0
    compiled = library() if fits else None
    return compiled is not None and compiled.moekit_level() >= 2


def forward(
    x: Float[Tensor, "T D"],
    rows: Rows,
    gate_up: Float[Tensor, "E twoI D"] | Sequence[Tensor | None],
    down: Float[Tensor, "E D I"] | Sequence[Tensor | None],
    keep: bool,
) -> tuple[Float[Tensor, "T D"], Kept | None]:
    """The weighted sum, for each token, of the experts of its rows, and, if wanted, what `backward` needs of it.

    The matrices are stacks, or one for each expert: None where it has no rows. Call only where `computes`. Who keeps,
    trains: from then on the process does not give freed memory back, but uses it again.
    """
    if keep:
        kernels().moekit_keep_memory()
    block = _Described(x, rows, gate_up, down)
    weights = rows.weights.new_zeros(rows.bounds[-1] if keep or rows.scatters else 0)
    block.point("row_weights", weights)
    kept = block.keep(Kept(block.new(2), weights)) if keep else None
    if rows.scatters:
        block.for_each_expert("inners", block.new(1))
    out = torch.empty_like(block.x)
    kernels().moekit_experts_forward(*block.arguments(), out.data_ptr())
    return out, kept


def backward(
    x: Float[Tensor, "T D"],
    rows: Rows,
    gate_up: Float[Tensor, "E twoI D"],
    down: Float[Tensor, "E D I"],
    kept: Kept,
    grad: Float[Tensor, "T D"],
) -> Gradients:
    """The gradients that follow from `grad`, that of `forward`'s sum, and what `forward` kept, which is used up."""
    block, grad = _Described(x, rows, gate_up, down), grad.to(x.dtype).contiguous()
    block.keep(kept)
    block.for_each_expert("inners", block.new(1))
    slopes = torch.empty_like(kept.weights)
    of_stacks = (_in_large_pages(torch.empty_like(m)) for m in (gate_up, down))
    of = Gradients(torch.empty_like(block.x), torch.empty_like(rows.weights), *of_stacks)
    places = (each.data_ptr() for each in (of.x, slopes, *of[1:]))
    kernels().moekit_experts_backward(*block.arguments(grad.data_ptr()), *places)
    return of


class _Described:
    """The C description of a block, and the memory that it points to."""

    def __init__(
        self,
        x: Tensor,
        rows: Rows,
        gate_up: Tensor | Sequence[Tensor | None],
        down: Tensor | Sequence[Tensor | None],
    ) -> None:
        assert rows.weights.dtype == torch.float32 and rows.tokens.dtype == rows.places.dtype == torch.int64
        self.x, width = x.contiguous(), x.shape[-1]
        self.inner = inner_width(down)
        self.bounds, self.groups = np.asarray(rows.bounds, np.int64), np.asarray(rows.groups, np.int64)
        self.sizes: list[int] = np.diff(self.bounds[self.groups]).tolist()
        room_rows = 0 if rows.scatters else max(map(sum, pairwise([0, *self.sizes])))
        self.room = _in_large_pages(x.new_empty(room_rows, width))
        summed = len(self.groups) > 2 and not rows.scatters
        self.sums = _in_large_pages(rows.weights.new_empty(len(x), width)) if summed else None
        self.kept: list[object] = []
        self.block = ExpertBlock(
            n_experts=len(rows.bounds) - 1,
            n_groups=len(self.groups) - 1,
            n_tokens=len(x),
            top_k=rows.places.shape[-1],
            width=width,
            inner=self.inner,
            room_rows=len(self.room),
            bits=NUMBERS[x.dtype],
            threads=torch.get_num_threads(),
            scatters=rows.scatters,
        )
        for name, tensor in (("tokens", rows.tokens), ("places", rows.places), ("weights", rows.weights)):
            self.point(name, tensor.contiguous())
        self.point("bounds", self.bounds)
        self.point("groups", self.groups)
        self.point("gate_up", _addresses(gate_up))
        self.point("down", _addresses(down))

    def new(self, matrices: int) -> list[Tensor]:
        """Memory for rows of `matrices` times I numbers, group by group: in pieces that glibc keeps."""
        return [_in_large_pages(self.x.new_empty(size, matrices * self.inner)) for size in self.sizes]

    def keep(self, kept: Kept) -> Kept:
        """Let the description hold where this lies."""
        self.point("row_weights", kept.weights)
        self.for_each_expert("hidden", kept.hidden)
        return kept

    def for_each_expert(self, name: str, pieces: list[Tensor]) -> None:
        """Let the field `name` hold where each expert's part of `pieces`, as from `new`, begins."""
        begins, row = self.bounds[:-1], pieces[0].shape[-1] * pieces[0].element_size()
        firsts = np.asarray([piece.data_ptr() for piece in pieces], np.int64) - row * begins[self.groups[:-1]]
        self.point(name, firsts.repeat(np.diff(self.groups)) + row * begins)
        self.kept.append(pieces)

    def arguments(self, *between: int) -> tuple[object, ...]:
        """The description, x, what is `between`, and the scratch memory."""
        sums = None if self.sums is None else self.sums.data_ptr()
        return ctypes.byref(self.block), self.x.data_ptr(), *between, self.room.data_ptr(), sums

    def point(self, name: str, values: "Tensor | np.ndarray[Any, np.dtype[np.int64]]") -> None:
        """Let the field `name` hold where these begin."""
        setattr(self.block, name, values.data_ptr() if isinstance(values, Tensor) else values.ctypes.data)
        self.kept.append(values)


def _in_large_pages(memory: Tensor) -> Tensor:
    kernels().moekit_large_pages(memory.data_ptr(), memory.nbytes)
    return memory


def inner_width(down: Float[Tensor, "E D I"] | Sequence[Tensor | None]) -> int:
    """I, of a stack or of the matrices that are there."""
    # Going through a stack would make a tensor of each expert.
    return (down if isinstance(down, Tensor) else next(m for m in down if m is not None)).shape[-1]


def scatters(bounds: Sequence[int], inner: int, number_bytes: int) -> bool:
    """Whether rows are added to their tokens' sums as they are computed, and not written.

    Faster where experts are narrow and have many rows each: those of a token are then many, and a step spends more on
    writing and reading them than on what it takes to pack the experts' matrices for this.
    """
    return inner * number_bytes <= NARROW and bounds[-1] > MANY * inner * (len(bounds) - 1)


def expert_groups(bounds: Sequence[int], row_bytes: int, group_bytes: int = GROUP) -> tuple[int, ...]:
    """Where groups of experts begin, and the end: one, or as few as hold `group_bytes` of rows, all of like sizes but
    for the last, which is half as large: nothing is computed while it is added up.

    A group ends with an expert, and so may hold more by the rows of one.
    """
    n_rows, n_bytes = bounds[-1], bounds[-1] * row_bytes
    n_groups = 1 if n_bytes <= group_bytes else -(-(2 * n_bytes + group_bytes) // (2 * group_bytes))
    found = [0]
    for expert in range(1, len(bounds) - 1):
        if len(found) < n_groups and bounds[expert] * (2 * n_groups - 1) >= 2 * n_rows * len(found):
            found.append(expert)
    return (*found, len(bounds) - 1)


def _addresses(matrices: Tensor | Sequence[Tensor | None]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    if isinstance(matrices, Tensor):
        assert matrices.is_contiguous()
        return matrices.data_ptr() + matrices[:1].nbytes * np.arange(len(matrices), dtype=np.int64)
    assert all(matrix is None or matrix.is_contiguous() for matrix in matrices)
    return np.asarray([0 if matrix is None else matrix.data_ptr() for matrix in matrices], dtype=np.int64)
