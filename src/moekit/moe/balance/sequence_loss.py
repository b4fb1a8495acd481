"""Complementary sequence-wise balance loss (arXiv 2412.19437, eqs 17-20): no sequence may lean on few experts."""

import torch

from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, mean_over_scope, probability, relative_load
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """As the expert-level loss on each sequence, with the choice the scores alone would make (eq 18): no bias."""

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        experts = self._unbiased(routing) if self.config.routing.steerable else routing.experts
        f = relative_load(chosen(experts, routing), self.pools, "sequence")
        terms = (f * probability(routing, self.pools, "sequence")).sum(dim=-1)
        return self.rule.coefficient * mean_over_scope(terms, routing, "sequence")

    def _unbiased(self, routing: Routing) -> Int[Tensor, "T K"]:
        """As many of each pool's best scores as the token chose there."""
        found, start = [], 0
        for (size, n_chosen), scores in zip(self.config.pools, routing.scores.split(self.pools, dim=-1), strict=True):
            found.append(scores.topk(n_chosen, dim=-1).indices + start)
            start += size
        best = torch.cat(found, dim=-1)
        return best.masked_fill(routing.experts < 0, -1) if best.shape == routing.experts.shape else routing.experts
