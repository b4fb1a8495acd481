"""Cross entropy of a linear head, in chunks of rows, so that the logits of a batch never exist whole."""

from typing import Any

import torch

from moekit.kernels.cross_entropy import cross_entropy_
from moekit.tensors import Float, Int, Tensor
from moekit.tensors.sums import add_

CHUNK = 512
"""Rows at a time: their float32 logits should stay in the processor's cache."""


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"], head: Float[Tensor, "V D"], targets: Int[Tensor, " T"]
) -> Float[Tensor, ""]:
    """The sum over rows of -log softmax(hidden head^T)[target], in nats; log-sum-exp and sum in float32."""
    return _LinearCrossEntropy.apply(hidden, head, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Both gradients are formed chunk by chunk while the chunk's probabilities are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        wants = hidden.requires_grad or head.requires_grad
        losses, grads_hidden = [], []
        grad_head: Tensor | None = None
        for rows, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = rows @ head.T
            losses.append(cross_entropy_(logits, target, wants).sum())
            if wants:
                grads_hidden.append(logits @ head)
                grad_head = _sum(grad_head, logits.T @ rows)
            del logits  # before the next chunk's are there
        if grad_head is not None:
            ctx.save_for_backward(torch.cat(grads_hidden), grad_head.to(head.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_head * grads[0].to(grad_head.dtype), None


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum so far, in float32."""
    return part.float() if total is None else add_(total, part)
