"""The experts' computation: many small SwiGLU blocks over rows sorted by expert, one product per expert."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moekit.moe.dispatch import Dispatch
from moekit.tensors import Float, Tensor


class Experts(nn.Module):
    """E SwiGLU blocks with stacked weights: gate and up rows in one matrix, in the [out, in] layout of a linear."""

    def __init__(self, n_experts: int, width: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(n_experts, width, expert_width))

    def forward(
        self, x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], plan: Dispatch
    ) -> Float[Tensor, "T D"]:
        """The weighted sum, for each token, of the experts that serve it."""
        return _ExpertBlock.apply(x, weights, self.gate_up, self.down, plan)


class _ExpertBlock(torch.autograd.Function):
    """Gather, two products per expert around SwiGLU, weighted sum; gradients need the first product alone.

    Indexing a stacked parameter under autograd would allocate a full-size zero gradient for each expert.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        hidden = _per_expert(x.index_select(0, plan.tokens), gate_up.mT, plan.rows)
        gate, up = hidden.chunk(2, dim=-1)
        out = _per_expert(F.silu(gate) * up, down.mT, plan.rows)
        ctx.save_for_backward(x, weights, gate_up, down, hidden)
        ctx.plan = plan
        return _sum_rows(out, plan, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x, weights, gate_up, down, hidden = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        gate, up = hidden.chunk(2, dim=-1)
        silu = F.silu(gate)
        inner = silu * up
        weight = weights.flatten()[plan.slots].unsqueeze(-1)
        grad_out = grads[0].to(x.dtype).index_select(0, plan.tokens)

        grad_inner = _per_expert(grad_out, down, plan.rows)
        grad_weight = (grad_inner * inner).sum(dim=-1, dtype=torch.float32)
        grad_weights = torch.zeros_like(weights).view(-1).index_copy_(0, plan.slots, grad_weight).view_as(weights)
        weight = weight.to(inner.dtype)
        grad_down = _outer_per_expert(grad_out, inner * weight, plan.rows)

        grad_inner *= weight
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad_inner, silu, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_inner * up, gate))
        grad_gate_up = _outer_per_expert(grad_hidden, x.index_select(0, plan.tokens), plan.rows)
        grad_x = _sum_rows(_per_expert(grad_hidden, gate_up, plan.rows), plan, None)
        return grad_x, grad_weights, grad_gate_up, grad_down, None


def _per_expert(x: Tensor, matrices: Tensor, rows: tuple[int, ...]) -> Tensor:
    """[R in] times [E in out], row by row with the matrix of the row's expert: [R out]."""
    out = x.new_empty(x.shape[0], matrices.shape[-1])
    for expert, matrix in enumerate(matrices.unbind(0)):
        start, end = rows[expert], rows[expert + 1]
        if end > start:
            torch.mm(x[start:end], matrix, out=out[start:end])
    return out


def _outer_per_expert(left: Tensor, right: Tensor, rows: tuple[int, ...]) -> Tensor:
    """[R out] and [R in] to the gradients of the experts' matrices, [E out in]; zero for an expert without rows."""
    out = left.new_empty(len(rows) - 1, left.shape[-1], right.shape[-1])
    for expert, matrix in enumerate(out.unbind(0)):
        start, end = rows[expert], rows[expert + 1]
        if end > start:
            torch.mm(left[start:end].mT, right[start:end], out=matrix)
        else:
            matrix.zero_()
    return out


def _sum_rows(rows: Tensor, plan: Dispatch, weights: Tensor | None) -> Tensor:
    """[R D] back to tokens: the (weighted) sum over each token's served places, accumulated in float32: [T D]."""
    served, (n_tokens, top_k) = rows.shape[0], plan.inverse.shape
    if served < n_tokens * top_k:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
    if n_tokens == 0:
        return rows.new_zeros(0, rows.shape[-1])
    factors = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(plan.inverse, rows, mode="sum", per_sample_weights=factors)
