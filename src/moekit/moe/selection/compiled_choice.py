"""The best experts of many tokens in compiled code, with gradients."""

from typing import Any

import torch

from moekit.kernels.choice import Chosen, Slopes, Steering, Way, backward, choose
from moekit.tensors import Float, Tensor


class CompiledChoice(torch.autograd.Function):
    """Experts, weights, scores and logits of tokens: the router's product and `select_top_k` behind it.

    Products of bfloat16 are exact in float32. The gradients of logits that all experts have are rounded to the type of
    the tokens before they meet the centroids, as those of any product are; those of the chosen experts alone are not.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centroids: Tensor, way: Way, bias: Tensor | None, factor: Tensor | None
    ) -> tuple[Tensor, ...]:
        found = choose(x, centroids, way, (bias, factor))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found.experts)
        ctx.save_for_backward(x, centroids, found.experts, found.scores, found.logits)
        ctx.way = way
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, centroids, experts, scores, found = ctx.saved_tensors
        if all(grad is None for grad in grads[1:]):
            return (None,) * 5
        # The weights are formed again from the scores.
        chosen = Chosen(experts, scores, scores, found)
        return (*backward(x, centroids, ctx.way, chosen, Slopes(*grads[1:])), None, None, None)


def compiled_choice(x: Float[Tensor, "T D"], centroids: Float[Tensor, "E D"], way: Way, steering: Steering) -> Chosen:
    """`CompiledChoice` by names. Call only where `kernels.logits.computes`."""
    return Chosen(*CompiledChoice.apply(x, centroids, way, *steering))
