"""The experts' computation: many small SwiGLU blocks over rows sorted by expert."""

from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from moekit.kernels import experts as compiled
from moekit.kernels import few_rows
from moekit.kernels.few_rows import Expert
from moekit.kernels.linear import must_be_called, place_in_file, place_of, reads_once
from moekit.kernels.mixture import Where
from moekit.kernels.packed import Matrix, Quantisable
from moekit.moe.compiled_block import compiled_block
from moekit.moe.dispatch import Dispatch, dispatch
from moekit.moe.expert_block import ExpertBlock, Kept, to_rows, without_stacks
from moekit.moe.quantised import weighted_sum
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor
from moekit.tensors.memory import InHugePages, prefer_huge_pages

FEW = 3
"""Rows for each expert that has any, on average, up to which reading each matrix row once beats tiles
(docs/speed.md)."""


@runtime_checkable
class Stored(Protocol):
    """Experts that are still on disk."""

    dtype: torch.dtype
    shapes: Sequence[tuple[int, ...]]
    """of the two matrices of one"""
    addresses: "array[int]"
    """where the two matrices of each begin, 0 for those that were not asked for yet"""

    def __call__(self, expert: int) -> tuple[Tensor, Tensor]:
        """The two matrices of one; after that their addresses are known."""
        ...


class Experts(Quantisable, InHugePages):
    """E SwiGLU blocks with stacked weights: gate and up rows in one matrix, in the [out, in] layout of a linear.

    `stored` gives one expert's two matrices where the stacks are still on disk: without gradients, experts to which no
    token comes are then never read. `round_inner` rounds silu(gate) * up before the second product; its gradient is
    taken to be the identity's. In training, a share `dropout` of silu(gate) * up is zeroed and the rest scaled by
    1 / (1 - dropout), as in the fine-tuning of arXiv 2101.03961, section 2.4. With `groups`, the stacks hold the bytes
    of quantised matrices.
    """

    def __init__(self, n_experts: int, width: int, expert_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.expert_width = dropout, expert_width
        self.stored: Stored | None = None
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(n_experts, width, expert_width))
        for weight in (self.gate_up, self.down):
            prefer_huge_pages(weight.detach())
        self.round_inner: Callable[[Tensor], Tensor] | None = None

    def forward(
        self,
        x: Float[Tensor, "T D"],
        weights: Float[Tensor, "T K"],
        plan: Dispatch,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "T D"]:
        """The weighted sum, for each token, of the experts that serve it. Dropout draws from `generator`."""
        if self.groups is not None:
            return weighted_sum(x, weights, plan, self._quantised)
        if self._few(x, plan):
            return self._read_once(x, weights, plan)
        stored = None if torch.is_grad_enabled() else self.stored
        if self._compiled(x):
            if stored is None:
                return compiled_block(x, weights, self.gate_up, self.down, plan)
            used = [stored(expert) if end > start else (None, None) for expert, (start, end) in _spans(plan)]
            gate_up, down = zip(*used, strict=True)
            return compiled_block(x, weights, gate_up, down, plan)
        kept = self._draw(x, plan, generator) if self._drops() else None
        if stored is not None:
            return without_stacks(x, weights, plan, stored, self.round_inner, kept)
        return ExpertBlock.apply(x, weights, self.gate_up, self.down, plan, self.round_inner, kept)

    def where(self, dtype: torch.dtype) -> Where | None:
        """Where the experts lie, for one compiled call for few rows of `dtype`; None where `forward` takes another
        way."""
        if self._drops() or self.round_inner is not None or must_be_called(self):
            return None
        stored = self.stored
        if stored is not None:
            shapes, table = stored.shapes, stored.addresses
            first, second = (place_in_file(shape, stored.dtype, self.groups, dtype) for shape in shapes)
            return None if first is None or second is None else Where(first, second, 0, 0, table)
        gate_up, down = self.gate_up, self.down
        first, second = place_of(gate_up, self.groups, dtype), place_of(down, self.groups, dtype)
        if first is None or second is None:
            return None
        return Where(first, second, gate_up.stride(0) * gate_up.itemsize, down.stride(0) * down.itemsize, None)

    def plan(self, x: Float[Tensor, "T D"], routing: Routing) -> Dispatch:
        """The rows of tokens like `x` by expert, as `forward` likes them best."""
        return dispatch(routing, 1 if self.groups is not None or self._compiled(x) else None)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0

    def _compiled(self, x: Tensor) -> bool:
        """Whether there is compiled code for any number of rows."""
        return not self._drops() and self.round_inner is None and compiled.computes(x, self.expert_width)

    def _one_by_one(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        """An expert's two matrices."""
        return self.stored or (lambda expert: (self.gate_up[expert], self.down[expert]))

    def _quantised(self, expert: int) -> tuple[Matrix, Matrix]:
        gate_up, down = self._one_by_one()(expert)
        return self.held(gate_up), self.held(down)

    def _few(self, x: Tensor, plan: Dispatch) -> bool:
        """Whether reading the experts is most of the work, and there is compiled code for it."""
        matrix = x if self.stored is not None else self.down
        if self._drops() or self.round_inner is not None or not reads_once(x, matrix, min(len(x), 1)):
            return False
        return plan.n_rows <= FEW * sum(end > start for _, (start, end) in _spans(plan))

    def _read_once(self, x: Tensor, weights: Tensor, plan: Dispatch) -> Tensor:
        """Few tokens: the experts they come to, in one parallel region of compiled code."""
        factors, matrices = to_rows(weights.float(), plan).flatten(), self._one_by_one()
        experts = [
            Expert(*matrices(expert), plan.tokens[start:end], factors[start:end])
            for expert, (start, end) in _spans(plan)
            if end > start
        ]
        return few_rows.swiglu(x, experts, x.dtype)

    def _draw(self, x: Tensor, plan: Dispatch, generator: torch.Generator | None) -> Kept:
        mask = torch.empty(plan.n_rows, self.expert_width, dtype=torch.bool, device=x.device)
        return Kept(mask.bernoulli_(1 - self.dropout, generator=generator), 1 / (1 - self.dropout))


def _spans(plan: Dispatch) -> enumerate[tuple[int, int]]:
    """Each expert's number and where its rows begin and end."""
    return enumerate(pairwise(plan.bounds))
