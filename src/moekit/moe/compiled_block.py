"""The expert block in compiled code, with gradients."""

from typing import Any

import torch

from moekit.kernels import experts
from moekit.moe.dispatch import Dispatch
from moekit.moe.expert_block import to_places, to_rows
from moekit.tensors import Float, Tensor


def rows_of(x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], plan: Dispatch) -> experts.Rows:
    """A routing of tokens like `x` as the compiled code takes it."""
    groups = experts.expert_groups(plan.bounds, x.shape[-1] * x.element_size())
    return experts.Rows(plan.bounds, plan.tokens, plan.rows, to_rows(weights.float(), plan).flatten(), groups)


class CompiledBlock(torch.autograd.Function):
    """As `ExpertBlock` without dropout and rounding; the rows' weights are not rounded to the type of the tokens.

    The result does not depend on the number of threads.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        rows = rows_of(x, weights, plan)
        y, hidden = experts.forward(x, rows, gate_up, down, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, gate_up, down)
        ctx.plan, ctx.rows, ctx.hidden, ctx.dtype = plan, rows, hidden, weights.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate_up, down = ctx.saved_tensors
        hidden = ctx.hidden
        # The backward pass uses up what the forward pass kept; a second one must do without.
        ctx.hidden = None
        if hidden is None:
            _, hidden = experts.forward(x, ctx.rows, gate_up, down, keep=True)
        of = experts.backward(x, ctx.rows, gate_up, down, hidden, grads[0])
        return of.x, to_places(of.weights, ctx.plan).to(ctx.dtype), of.gate_up, of.down, None
