"""The expert block in plain torch: one product per expert and direction over rows sorted by expert."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moekit.moe.dispatch import Dispatch
from moekit.tensors import Bool, Float, Tensor


class Kept(NamedTuple):
    """Expert dropout of one pass: the inner numbers that stay, and the factor 1 / (1 - p) by which they grow."""

    mask: Bool[Tensor, "R I"]
    factor: float

    def drop_(self, inner: Float[Tensor, "R I"]) -> Float[Tensor, "R I"]:
        """`inner`, or its gradient, changed in place."""
        return inner.mul_(self.mask).mul_(self.factor)


class ExpertBlock(torch.autograd.Function):
    """Gather, two products per expert around SwiGLU, weighted sum; the backward needs the first product alone.

    Indexing a stacked parameter under autograd would allocate a full-size zero gradient for each expert.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        plan: Dispatch,
        round_inner: Callable[[Tensor], Tensor] | None,
        kept: Kept | None,
    ) -> Tensor:
        hidden = _per_expert(x.index_select(0, plan.tokens), gate_up.mT, plan)
        gate, up = hidden.chunk(2, dim=-1)
        out = _per_expert(_before_down(F.silu(gate) * up, kept, round_inner), down.mT, plan)
        ctx.save_for_backward(x, weights, gate_up, down, hidden)
        ctx.plan, ctx.round_inner, ctx.kept = plan, round_inner, kept
        return _sum_rows(out, plan, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, gate_up, down, hidden = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        kept: Kept | None = ctx.kept
        gate, up = hidden.chunk(2, dim=-1)
        silu = F.silu(gate)
        inner = _before_down(silu * up, kept, ctx.round_inner)
        # Rows of padding hold some token's values; with a gradient of zero they add nothing anywhere.
        grad_out = grads[0].to(x.dtype).index_select(0, plan.tokens).index_fill_(0, plan.padding, 0)
        weight = to_rows(weights.to(x.dtype), plan)

        grad_inner = _per_expert(grad_out, down, plan)
        grad_weights = to_places((grad_inner * inner).sum(dim=-1, dtype=weights.dtype), plan)
        grad_down = _outer_per_expert(grad_out, inner.mul_(weight), plan)

        grad_inner *= weight
        if kept is not None:
            kept.drop_(grad_inner)
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad_inner, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up), gate, grad_input=grad_gate)
        grad_gate_up = _outer_per_expert(grad_hidden, x.index_select(0, plan.tokens), plan)
        grad_x = _sum_rows(_per_expert(grad_hidden, gate_up, plan), plan, None)
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None, None


def without_stacks(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    plan: Dispatch,
    stored: Callable[[int], tuple[Tensor, Tensor]],
    round_inner: Callable[[Tensor], Tensor] | None,
    kept: Kept | None,
) -> Float[Tensor, "T D"]:
    """As `ExpertBlock`, without gradients, for matrices that are given one expert at a time."""
    out = x.new_empty(plan.n_rows, x.shape[-1])
    for expert, (start, end) in enumerate(pairwise(plan.bounds)):
        if end > start:
            gate_up, down = stored(expert)
            gate, up = F.linear(x.index_select(0, plan.tokens[start:end]), gate_up).chunk(2, dim=-1)
            rows = None if kept is None else kept._replace(mask=kept.mask[start:end])
            torch.mm(_before_down(F.silu(gate) * up, rows, round_inner), down.mT, out=out[start:end])
    return _sum_rows(out, plan, weights)


def _before_down(inner: Tensor, kept: Kept | None, round_inner: Callable[[Tensor], Tensor] | None) -> Tensor:
    """silu(gate) * up, [R I], as the second product takes it; it may be changed in place."""
    inner = inner if kept is None else kept.drop_(inner)
    return inner if round_inner is None else round_inner(inner)


def _per_expert(x: Tensor, matrices: Tensor, plan: Dispatch) -> Tensor:
    """[R in] times [E in out], row by row with the matrix of the row's expert: [R out]."""
    out = x.new_empty(x.shape[0], matrices.shape[-1])
    for expert, matrix in enumerate(matrices.unbind(0)):
        start, end = plan.bounds[expert], plan.bounds[expert + 1]
        if end > start:
            torch.mm(x[start:end], matrix, out=out[start:end])
    return out


def _outer_per_expert(left: Tensor, right: Tensor, plan: Dispatch) -> Tensor:
    """[R out] and [R in] to the gradients of the experts' matrices, [E out in]; zero for an expert without rows."""
    out = left.new_empty(len(plan.bounds) - 1, left.shape[-1], right.shape[-1])
    for expert, matrix in enumerate(out.unbind(0)):
        start, end = plan.bounds[expert], plan.bounds[expert + 1]
        if end > start:
            torch.mm(left[start:end].mT, right[start:end], out=matrix)
        else:
            matrix.zero_()
    return out


def _sum_rows(values: Tensor, plan: Dispatch, weights: Tensor | None) -> Tensor:
    """[R D] back to tokens: the (weighted) sum over each token's served places, accumulated in float32: [T D]."""
    if len(plan.rows) == 0:
        return values.new_zeros(0, values.shape[-1])
    if not plan.full:
        values = torch.cat([values, values.new_zeros(1, values.shape[-1])])
    factors = None if weights is None else weights.to(values.dtype)
    return F.embedding_bag(plan.rows, values, mode="sum", per_sample_weights=factors)


def to_rows(weights: Tensor, plan: Dispatch) -> Tensor:
    """The weight of each row, [R 1]; 0 for padding."""
    rows = weights.new_zeros(plan.n_rows + 1).index_copy_(0, plan.rows.flatten(), weights.flatten())
    return rows[:-1].unsqueeze(-1)


def to_places(values: Tensor, plan: Dispatch) -> Tensor:
    """[R] back to the places of the routing, [T K]; 0 where a place is empty."""
    return torch.cat([values, values.new_zeros(1)])[plan.rows]
