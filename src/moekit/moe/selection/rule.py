"""What a selection rule is: from the tokens' logits, which experts serve each and with which weight."""

from typing import Any, NamedTuple

import torch

from moekit.config.moe import MoEConfig
from moekit.kernels import few_rows, logits
from moekit.kernels.choice import Way
from moekit.kernels.linear import reads_once
from moekit.moe.experts import Experts
from moekit.moe.routing import Drawn, Routing
from moekit.moe.state import Float32State
from moekit.tensors import Bool, Float, Int, Tensor


class Tokens(NamedTuple):
    """What a rule may look at: T tokens of `n_sequences` sequences of equal length, one after the other.

    `bias` is added to scores when experts are chosen, `factor` multiplied with them before; the weights never see
    either. `mask` is False at padding. `ids` are the token ids, `tasks` each token's task. Random numbers come from
    `generator` (None: torch's default).
    """

    x: Float[Tensor, "T D"]
    bias: Float[Tensor, " E"] | None = None
    factor: Float[Tensor, " E"] | None = None
    mask: Bool[Tensor, " T"] | None = None
    n_sequences: int = 1
    ids: Int[Tensor, " T"] | None = None
    tasks: Int[Tensor, " T"] | None = None
    generator: torch.Generator | None = None

    def steered(self, scores: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The scores by which experts are chosen."""
        if self.factor is not None:
            scores = scores * self.factor
        return scores if self.bias is None else scores + self.bias


class Selection(NamedTuple):
    """Chosen experts with their weights in float32, and the scores of all experts.

    Empty places are -1, stand at the end of a token's row, and have a weight of 0. `ranking` orders a token's experts
    where the scores do not, -inf for those it may not use. `drawn` tells where noisy logits came from.
    """

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    ranking: Float[Tensor, "T E"] | None = None
    drawn: Drawn | None = None


class SelectionRule(Float32State):
    """A rule overrides `select`, and of the rest what is otherwise with it.

    State is a parameter without gradient (`moekit.moe.state`), and changes in `after_step` alone.
    """

    def __init__(self, rule: Any, config: MoEConfig) -> None:
        super().__init__()
        self.rule = rule
        self.config = config

    def start(self) -> None:
        """Set trained parameters that do not start from a normal distribution."""

    def logits(self, tokens: Tokens, centroids: Float[Tensor, "L D"] | None) -> Float[Tensor, "T L"]:
        """Each token's affinity to each centroid (u . e_i in arXiv 2401.06066), float32 whatever the model's dtype."""
        assert centroids is not None
        if reads_once(tokens.x, centroids, tokens.x.shape[0]):
            return few_rows.linear(tokens.x, centroids)
        if logits.computes(tokens.x, centroids):
            return logits.Logits.apply(tokens.x, centroids)
        return tokens.x.float() @ centroids.float().T

    def route(self, tokens: Tokens, centroids: Float[Tensor, "L D"] | None) -> tuple[Float[Tensor, "T L"], Selection]:
        """Logits, and the choice by them."""
        logits = self.logits(tokens, centroids)
        return logits, self.select(logits, tokens)

    def select(self, logits: Float[Tensor, "T L"], tokens: Tokens) -> Selection:
        """The choice. `self.training` tells whether noise and whatever else is for training alone takes part."""
        raise NotImplementedError

    def way(self) -> Way | None:
        """How `select` chooses, where compiled code knows the way."""
        return None

    def combine(
        self,
        x: Float[Tensor, "T D"],
        routing: Routing,
        experts: Experts,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "T D"]:
        """What the experts make of the tokens. Their dropout draws from `generator`."""
        return experts(x, routing.weights, experts.plan(x, routing), generator)

    def observe(self, routing: Routing) -> Float[Tensor, " *shape"] | None:  # noqa: ARG002
        """What `after_step` must know of a micro-batch; it is summed over those of a step."""
        return None

    def after_step(self, observed: Float[Tensor, " *shape"]) -> None:  # noqa: ARG002
        """Follow what was observed in the optimizer step that ended."""
        return None


def chosen_weights(scores: Float[Tensor, "T E"], experts: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """The scores of the chosen experts; 0 at empty places."""
    return scores.gather(-1, experts.clamp_min(0)).masked_fill(experts < 0, 0)


def normalised(weights: Float[Tensor, "T K"], epsilon: float = 0.0) -> Float[Tensor, "T K"]:
    """A token's weights divided by their sum; zeros stay zeros."""
    total = weights.sum(dim=-1, keepdim=True) + epsilon
    return weights / total.masked_fill(total == 0, 1)


def listed(chosen: Bool[Tensor, "T E"], ranking: Float[Tensor, "T E"]) -> Int[Tensor, "T K"]:
    """The chosen experts of each token, best first, then -1; K is the most that any token has, at least 1."""
    most = max(int(chosen.sum(dim=-1).max()), 1) if len(chosen) else 1
    best = ranking.detach().masked_fill(~chosen, -torch.inf).topk(most, dim=-1).indices
    return best.masked_fill(~chosen.gather(-1, best), -1)
