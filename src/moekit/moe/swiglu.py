"""The feed-forward that every token passes: a dense layer's, or the shared experts of a mixture."""

import torch
import torch.nn.functional as F
from torch import nn

from moekit.kernels import experts as compiled
from moekit.kernels.linear import Linear, reads_once
from moekit.moe import quantised
from moekit.moe.compiled_block import CompiledBlock
from moekit.moe.dispatch import everything
from moekit.tensors import Float, Tensor


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix (arXiv 2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.inner_width = inner_width
        self.gate_up = Linear(width, 2 * inner_width, bias=False)
        self.down = Linear(inner_width, width, bias=False)

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        groups = self.gate_up.groups
        if groups is not None and groups == self.down.groups:
            return quantised.swiglu(x, self.gate_up.weight, self.down.weight, groups)
        if self._as_one_expert(x):
            tokens = x.reshape(-1, x.shape[-1])
            stacks = (self.gate_up.weight.unsqueeze(0), self.down.weight.unsqueeze(0))
            weights = torch.ones(len(tokens), 1)
            return CompiledBlock.apply(tokens, weights, *stacks, everything(len(tokens))).view_as(x)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def _as_one_expert(self, x: Tensor) -> bool:
        """Whether the compiled expert block computes the same: nothing is quantised or listens to the two products."""
        products = (self.gate_up, self.down)
        if any(each.groups is not None or each._forward_pre_hooks or each._forward_hooks for each in products):
            return False
        rows = x.numel() // max(x.shape[-1], 1)
        few = reads_once(x, x, rows)
        return rows > 0 and not few and x.dtype == self.down.weight.dtype and compiled.computes(x, self.inner_width)
