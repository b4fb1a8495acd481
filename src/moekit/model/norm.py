"""RMSNorm (arXiv 1910.07467)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moekit.kernels.linear import listened, must_be_called
from moekit.kernels.norm import Normed, norm, norm_alone, norm_backward, norm_of_sum
from moekit.tensors import Float, Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight; the mean is taken in float32."""

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        if not torch.is_grad_enabled():
            return norm_alone(x, self.weight, self.epsilon)
        return _RMSNorm.apply(x, self.weight, self.epsilon)

    def of_sum(
        self, x: Float[Tensor, "*shape D"], added: Float[Tensor, "*shape D"]
    ) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, "*shape D"]]:
        """x + added, and the norm of that."""
        if torch.is_grad_enabled() or listened(self):
            total = x + added
            return total, self(total)
        return norm_of_sum(x, added, self.weight, self.epsilon)

    def readable(self, dtype: torch.dtype) -> bool:
        """Whether compiled code that norms rows of `dtype` may pass this module by."""
        weight = self.weight
        return not must_be_called(self) and weight.dtype == dtype and weight.is_cpu and weight.is_contiguous()


def norms_alike(norms: Sequence[RMSNorm], dtype: torch.dtype) -> bool:
    """Whether compiled code may norm rows of `dtype` as all of these do, with the epsilon of the first."""
    return all(each.epsilon == norms[0].epsilon and each.readable(dtype) for each in norms)


class _RMSNorm(torch.autograd.Function):
    """On a CPU, torch's own gradient takes several times as long as this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed = norm(x, weight, epsilon)
        # What x / rms(x) tells beside it is kept anyway, by what reads it next.
        y = None if normed.unit is not None else normed.y
        ctx.save_for_backward(weight, y, normed.scale, normed.unit)
        return normed.y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, y, scale, unit = ctx.saved_tensors
        return *norm_backward(Normed(y, scale, unit), weight, grads[0]), None
