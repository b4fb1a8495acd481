"""The router: scores, a selection rule, and the capacities that its choice must keep."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from moekit.config.moe import MoEConfig
from moekit.kernels.few_rows import Place
from moekit.kernels.linear import place_of
from moekit.moe.capacity import build_capacity
from moekit.moe.routing import Routing
from moekit.moe.selection import Tokens, build_selection
from moekit.tensors import Bool, Float, Int, Tensor


class Router(nn.Module):
    """Holds an expert's centroid for each choice (e_i in arXiv 2401.06066) and the selection rule of the layer."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.rule = build_selection(config)
        self.capacity = build_capacity(config)
        n_centroids = config.routing.n_centroids(config.n_routed)
        self.centroids = nn.Parameter(torch.empty(n_centroids, config.width)) if n_centroids else None

    def forward(
        self,
        x: Float[Tensor, "T D"],
        bias: Float[Tensor, " E"] | None = None,
        factor: Float[Tensor, " E"] | None = None,
        mask: Bool[Tensor, " T"] | None = None,
        n_sequences: int = 1,
        ids: Int[Tensor, " T"] | None = None,
        tasks: Int[Tensor, " T"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """Route T tokens; for the arguments see `Tokens`. Logits, scores and weights are float32 in every model."""
        tokens = Tokens(x, bias, factor, mask, n_sequences, ids, tasks, generator)
        with _without_autocast(tokens.x.device.type):
            logits, found = self.rule.route(tokens, self.centroids)
            experts, weights, scores, _, drawn = found
            routing = Routing(experts, weights, scores, logits, tokens.n_sequences, None, tokens.mask, drawn)
            if self.capacity is None or not self.limits():
                return routing
            ranking = scores if found.ranking is None else found.ranking
            return self.capacity.limit(routing, ranking.detach(), tokens.generator)

    def limits(self) -> bool:
        """Whether capacities take part now."""
        return self.capacity is not None and (self.training or self.capacity.in_evaluation)

    def place(self, dtype: torch.dtype) -> Place | None:
        """Where the centroids lie, for compiled code with rows of `dtype`; None where it cannot read them."""
        return None if self.centroids is None else place_of(self.centroids, None, dtype)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Switching off what is off already takes longer than a token's softmax."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
