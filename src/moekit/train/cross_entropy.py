"""Cross entropy of a linear head, in chunks of rows, so that the logits of a batch never exist whole."""

from typing import Any

import torch

from moekit.tensors import Float, Int, Tensor

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
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wants else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows, target = hidden[start : start + CHUNK], targets[start : start + CHUNK].unsqueeze(-1)
            log_probability = torch.log_softmax(rows @ head.T, dim=-1, dtype=torch.float32)
            total -= log_probability.gather(-1, target).sum()
            if grad_hidden is None or grad_head is None:
                continue
            slope = log_probability.exp_().scatter_add_(-1, target, torch.full_like(target, -1, dtype=torch.float32))
            slope = slope.to(hidden.dtype)
            torch.mm(slope, head, out=grad_hidden[start : start + CHUNK])
            grad_head += slope.T @ rows
        if grad_hidden is not None and grad_head is not None:
            ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), grad_head * grads[0].to(grad_head.dtype), None
