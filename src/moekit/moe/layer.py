"""The mixture-of-experts layer: route, dispatch, compute, combine, add the shared experts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moekit.config.moe import MoEConfig
from moekit.moe.balance import build_balance, selection_bias
from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from moekit.moe.routing import Router, Routing
from moekit.tensors import Bool, Float, Tensor


class MoEOutput(NamedTuple):
    """What the layer adds to the residual stream, and the routing that led there."""

    y: Float[Tensor, "*shape D"]
    routing: Routing


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix (arXiv 2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner_width, bias=False)
        self.down = nn.Linear(inner_width, width, bias=False)

    def forward(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoE(nn.Module):
    """A drop-in replacement for a feed-forward block (arXiv 2401.06066, eq 9, without the residual).

    `balance` maps the kind of each balancing rule to its module. Weights are drawn as in DeepSeek's models; give
    `initialise` of `moekit.model.init` for another standard deviation.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        if config.width == 0:
            raise ValueError("`width`: a layer on its own needs the width of its tokens")
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config.n_routed, config.width, config.expert_width)
        self.shared = SwiGLU(config.width, config.shared_width) if config.n_shared else None
        self.shared_gate = nn.Linear(config.width, 1, bias=False) if config.shared_gate else None
        self.balance = build_balance(config)
        for weight in self.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.02)

    def forward(self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None) -> MoEOutput:
        """Tokens of any leading shape; the dimension before the last is the sequence. `mask` marks real tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        n_sequences = max(tokens.shape[0] // x.shape[-2], 1) if x.dim() > 1 and x.shape[-2] else 1
        flat_mask = None if mask is None else mask.reshape(-1)
        routing = self.router(tokens, selection_bias(self.balance), flat_mask, n_sequences)
        y = self.experts(tokens, routing.weights, dispatch(routing))
        if self.shared is not None:
            shared = self.shared(tokens)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(tokens)) * shared)
        return MoEOutput(y.view_as(x), routing)
