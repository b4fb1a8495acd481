"""Quantised matrices where there is no compiler: copies for torch's own products with 4-bit numbers.

With one row such a product is 10 to 40 times as fast as restoring the matrix for it (AVX512; AVX2: 2 to 10 times).
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch

from moekit.config.quantisation import Groups
from moekit.kernels.groups import Grouped, meaning_of, numbers_of
from moekit.kernels.library import library
from moekit.tensors import Float, Tensor
from moekit.tensors.memory import memory_bytes, spare_bytes

MULTIPLE = 16
"""torch packs matrices whose rows are a multiple of it."""

MOST = {("AVX512", 4): math.inf, ("AVX512", 8): 128, ("AVX2", 4): 128, ("AVX2", 8): 16}
"""By instruction set and bits, the rows up to which such a product is faster than restoring (2816 x 2048)."""

BLOCK = 64
"""Rows that torch packs together, or a multiple of them."""

NUMBERS = 1 << 20
"""How many are packed at once, at least a block of rows."""

SPARE = 1 / 4
"""The share of memory that copies leave free."""


class Packed(NamedTuple):
    """A quantised matrix [O, I] as a sum of matrices of 4-bit numbers: of 8-bit ones the high halves, then the low.

    Each comes with what its numbers mean, [I / group, O, 2] in bfloat16: scale, and the value of number 8.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    source: Grouped

    def takes(self, rows: int) -> bool:
        """Whether a product of so many rows is for `product`, or for the restored `source`."""
        return rows <= MOST[torch.backends.cpu.get_cpu_capability(), self.source.bits]


Matrix = Tensor | Grouped | Packed
"""In bfloat16, quantised, or a copy of a quantised one for machines without compiled code."""


class Copies:
    """Copies of a module's quantised matrices, each made when it is first asked for. A copy of this has none."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Packed]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, ()

    def of(self, matrix: Grouped) -> Grouped | Packed:
        """What products with `matrix` should take: itself where there is compiled code for it, or no room for a copy.

        The copy follows the matrix when that is changed or replaced.
        """
        if library() is not None or not packable(matrix):
            return matrix
        rows = matrix.rows
        # A copy keeps the rows that it was made of, so that no others come to lie where they do.
        version, copy = self._known.get(rows.data_ptr(), (0, None))
        if copy is not None and version == rows._version and copy.source.rows.shape == rows.shape:
            return copy
        if spare_bytes() - rows.nbytes < SPARE * memory_bytes():
            return matrix
        copy = pack(matrix)
        self._known[rows.data_ptr()] = rows._version, copy
        return copy


class Quantisable:
    """What modules share whose matrices may be quantised: with `groups`, they hold the bytes of such matrices."""

    groups: Groups | None = None

    @cached_property
    def copies(self) -> Copies:
        """What machines without compiled code use in place of quantised matrices."""
        return Copies()

    def held(self, matrix: Tensor) -> Matrix:
        """A matrix of this module as products without gradients take it."""
        if self.groups is None:
            return matrix
        return self.copies.of(Grouped(matrix, self.groups.bits, self.groups.size))


def packable(matrix: Grouped) -> bool:
    """Whether torch has a fast product for this matrix, whose changes can be seen."""
    rows = matrix.rows
    fits = rows.is_cpu and not rows.is_inference() and len(rows) > 0 and len(rows) % MULTIPLE == 0
    return fits and (torch.backends.cpu.get_cpu_capability(), matrix.bits) in MOST


def pack(matrix: Grouped) -> Packed:
    """The same matrix in the layout of torch's product; scales and values of number 8 are rounded to bfloat16."""
    out, inputs = len(matrix.rows), matrix.inputs
    parts = [
        (
            torch.empty(out, inputs // 2, dtype=torch.uint8),
            torch.empty(inputs // matrix.group, out, 2, dtype=torch.bfloat16),
        )
        for _ in range(matrix.bits // 4)
    ]
    # Block after block of rows: all at once, as whole numbers of 32 bits, would take eight times the room.
    size = max(NUMBERS // inputs // BLOCK, 1) * BLOCK
    for begin in range(0, out, size):
        block = matrix._replace(rows=matrix.rows[begin : begin + size])
        numbers, (scale, least) = numbers_of(block), meaning_of(block)
        own = [(packed[begin : begin + size], meaning[:, begin : begin + size]) for packed, meaning in parts]
        if matrix.bits == 4:
            _fill(own[0], numbers, scale, least + 8 * scale)
        else:
            _fill(own[0], numbers >> 4, 16 * scale, least + 128 * scale)
            _fill(own[1], numbers & 15, scale, 8 * scale)
    return Packed(tuple(parts), matrix)


def product(x: Float[Tensor, "T I"], matrix: Packed) -> Float[Tensor, "T O"]:
    """x W^T in float32; x, and the product with each part, are rounded to bfloat16."""
    narrow = x.bfloat16().contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    group = matrix.source.group
    y, *others = (multiply(narrow, numbers, group, meaning).float() for numbers, meaning in matrix.parts)
    return y.add_(others[0]) if others else y


def _fill(part: tuple[Tensor, Tensor], numbers: Tensor, scale: Tensor, eight: Tensor) -> None:
    part[0].copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1))
    part[1].copy_(torch.stack([scale, eight], dim=-1).transpose(0, 1))
