"""RMSNorm (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import nn

from moekit.tensors import Float, Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight; the mean is taken in float32."""

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
