"""The feed-forward that every token passes: a dense layer's, or the shared experts of a mixture."""

import torch
import torch.nn.functional as F
from torch import nn

from moekit.kernels import experts as compiled
from moekit.kernels.few_rows import Place
from moekit.kernels.linear import Linear, in_one_call, listened, must_be_called, reads_once
from moekit.kernels.mixture import block
from moekit.kernels.token import run
from moekit.moe import quantised
from moekit.moe.compiled_block import compiled_block
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
        rows = x.numel() // max(x.shape[-1], 1)
        if in_one_call(x, rows) and (places := self.places(x.dtype)) is not None:
            x = x.contiguous()
            run(block(x, y := torch.empty_like(x), *places, adds=False))
            return y
        groups = self.gate_up.groups
        if groups is not None and groups == self.down.groups:
            return quantised.swiglu(x, self.gate_up.held(self.gate_up.weight), self.down.held(self.down.weight))
        if self._as_one_expert(x, rows):
            tokens = x.reshape(-1, x.shape[-1])
            stacks = (self.gate_up.weight.unsqueeze(0), self.down.weight.unsqueeze(0))
            weights = torch.ones(len(tokens), 1)
            return compiled_block(tokens, weights, *stacks, everything(len(tokens))).view_as(x)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def places(self, dtype: torch.dtype) -> tuple[Place, Place] | None:
        """Where the two matrices lie, for compiled code that takes this block and others in one call with rows of
        `dtype`; None where that would not be the same."""
        if must_be_called(self):
            return None
        gate_up, down = self.gate_up.place(dtype), self.down.place(dtype)
        return None if gate_up is None or down is None else (gate_up, down)

    def described(self, x: Float[Tensor, "*shape D"], y: Float[Tensor, "*shape D"]) -> bytes | None:
        """The job of compiled code that adds what this block makes of few tokens to `y`; None where it would not be
        the same."""
        places = self.places(x.dtype)
        return None if places is None else block(x, y, *places, adds=True)

    def _as_one_expert(self, x: Tensor, rows: int) -> bool:
        """Whether the compiled expert block computes the same: nothing is quantised or listens to the two products."""
        products = (self.gate_up, self.down)
        if any(each.groups is not None or listened(each) for each in products):
            return False
        few = reads_once(x, x, rows)
        return rows > 0 and not few and x.dtype == self.down.weight.dtype and compiled.computes(x, self.inner_width)
