"""Complementary sequence-wise balance loss (arXiv 2412.19437, eqs 17-20): no sequence may lean on few experts."""

import torch

from moekit.config.balance import SequenceLoss
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, mean_over_scope, probability, relative_load
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """As the expert-level loss on each sequence, with the choice the scores alone would make (eq 18): no bias."""

    def __init__(self, rule: SequenceLoss, config: MoEConfig) -> None:
        super().__init__()
        self.coefficient = rule.coefficient
        self.pools = config.pools
        self.steerable = config.routing.steerable

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        experts = self._unbiased(routing) if self.steerable else routing.experts
        f = relative_load(chosen(experts, routing), "sequence")
        terms = (f * probability(routing, "sequence")).sum(dim=-1)
        return self.coefficient * mean_over_scope(terms, routing, "sequence")

    def _unbiased(self, routing: Routing) -> Int[Tensor, "T K"]:
        """As many of each pool's best scores as the token chose there."""
        found, start = [], 0
        for (size, chosen_here), scores in zip(
            self.pools, routing.scores.split([size for size, _ in self.pools], dim=-1), strict=True
        ):
            found.append(scores.topk(chosen_here, dim=-1).indices + start)
            start += size
        best = torch.cat(found, dim=-1)
        return best.masked_fill(routing.experts < 0, -1) if best.shape == routing.experts.shape else routing.experts
