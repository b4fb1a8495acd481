"""The router: which experts serve which token, with which weight. Routing is a value; all else consumes it."""

from typing import NamedTuple

import torch
from torch import nn

from moekit.config.moe import MoEConfig, TopKRouting
from moekit.tensors import Bool, Float, Int, Tensor


class Routing(NamedTuple):
    """A router's decision for T tokens.

    `experts` holds the assignment before any token is dropped; -1 marks an empty slot, so that a token may use fewer
    than K experts. `kept` says which slots are served (None: all of them), `mask` which tokens are real (None: all).
    """

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]
    n_sequences: int = 1
    kept: Bool[Tensor, "T K"] | None = None
    mask: Bool[Tensor, " T"] | None = None

    @property
    def n_experts(self) -> int:
        """Number of routed experts, E."""
        return self.scores.shape[-1]


class Router(nn.Module):
    """Scores every expert by the product of the token and the expert's centroid (e_i in arXiv 2401.06066)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.routing = config.routing
        self.centroids = nn.Parameter(torch.empty(config.n_routed, config.width))

    def forward(
        self,
        x: Float[Tensor, "T D"],
        bias: Float[Tensor, " E"] | None = None,
        mask: Bool[Tensor, " T"] | None = None,
        n_sequences: int = 1,
    ) -> Routing:
        """Route T tokens. Logits, scores and weights are float32 whatever the model's dtype."""
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.centroids.float().T
        experts, weights, scores = select(self.routing, self.top_k, logits, bias)
        return Routing(experts, weights, scores, logits, n_sequences, mask=mask)


class Selection(NamedTuple):
    """Chosen experts with their weights, and the scores of all experts."""

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]


def select(
    rule: TopKRouting, top_k: int, logits: Float[Tensor, "T E"], bias: Float[Tensor, " E"] | None = None
) -> Selection:
    """Top-k selection as DeepSeekMoE (eqs 9-11), DeepSeek-V2 (eqs 20-22), V3 (eqs 12-16) and Mixtral define it.

    `bias` steers *which* experts win; the weights never see it (arXiv 2412.19437, eq 16).
    """
    scores = logits.sigmoid() if rule.score == "sigmoid" else logits.softmax(dim=-1)
    ranking = scores if bias is None else scores + bias
    if rule.top_k_groups < rule.n_groups:
        ranking = within_best_groups(ranking, rule)
    experts = ranking.topk(top_k, dim=-1).indices
    if rule.order == "top_k_then_score":
        chosen = logits.gather(-1, experts)
        weights = chosen.sigmoid() if rule.score == "sigmoid" else chosen.softmax(dim=-1)
    else:
        weights = scores.gather(-1, experts)
    if rule.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + rule.epsilon)
    return Selection(experts, weights * rule.scale, scores)


def within_best_groups(ranking: Float[Tensor, "T E"], rule: TopKRouting) -> Float[Tensor, "T E"]:
    """Rank experts outside a token's best groups at -inf, so that even a negative bias cannot lose to them.

    A group's worth is its best expert (V2: the devices with the highest affinity) or the sum of its two best (V3).
    """
    by_group = ranking.unflatten(-1, (rule.n_groups, -1))
    worth = by_group.amax(dim=-1) if rule.group_score == "max" else by_group.topk(2, dim=-1).values.sum(dim=-1)
    best = worth.topk(rule.top_k_groups, dim=-1).indices
    closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
    return by_group.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)
