"""The expert block in compiled code, with gradients."""

from collections.abc import Sequence
from typing import Any

import torch

from moekit.kernels import experts
from moekit.moe.dispatch import Dispatch
from moekit.tensors import Float, Tensor


def rows_of(x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], inner: int, plan: Dispatch) -> experts.Rows:
    """A routing of tokens like `x` to experts of this inner width as the compiled code takes it."""
    groups = experts.expert_groups(plan.bounds, x.shape[-1] * x.element_size())
    scatters = experts.scatters(plan.bounds, inner, x.element_size())
    return experts.Rows(plan.bounds, plan.tokens, plan.rows, weights.float().contiguous(), groups, scatters)


def compiled_block(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T K"],
    gate_up: Float[Tensor, "E twoI D"] | Sequence[Tensor | None],
    down: Float[Tensor, "E D I"] | Sequence[Tensor | None],
    plan: Dispatch,
) -> Float[Tensor, "T D"]:
    """The weighted sum, for each token, of the experts of its rows. Call only where `kernels.experts.computes`.

    Without gradients the matrices may be one for each expert: None where it has no rows.
    """
    if torch.is_grad_enabled():
        return CompiledBlock.apply(x, weights, gate_up, down, plan)
    # Inside a function with gradients nothing tells that there are to be none, and it would keep what they need.
    rows = rows_of(x, weights, experts.inner_width(down), plan)
    return experts.forward(x, rows, gate_up, down, keep=False)[0]


class CompiledBlock(torch.autograd.Function):
    """As `ExpertBlock` without dropout and rounding; the rows' weights are not rounded to the type of the tokens.

    The result does not depend on the number of threads.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        rows = rows_of(x, weights, down.shape[-1], plan)
        y, kept = experts.forward(x, rows, gate_up, down, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(x, gate_up, down)
        ctx.rows, ctx.kept, ctx.dtype = rows, kept, weights.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate_up, down = ctx.saved_tensors
        # The backward pass uses up what the forward pass kept; a second one must do without.
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            _, kept = experts.forward(x, ctx.rows, gate_up, down, keep=True)
            assert kept is not None
        of = experts.backward(x, ctx.rows, gate_up, down, kept, grads[0])
        return of.x, of.weights.to(ctx.dtype), of.gate_up, of.down, None
