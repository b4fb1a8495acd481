"""Complementary sequence-wise balance loss (arXiv 2412.19437, eqs 17-20): no sequence may lean on few experts."""

from moekit.config.balance import SequenceLoss
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, frequency, mean_over_scope, probability
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class SequenceLossRule(BalanceRule):
    """As the expert-level loss on each sequence, with the choice the scores alone would make (eq 18): no bias."""

    def __init__(self, rule: SequenceLoss, config: MoEConfig) -> None:
        super().__init__()
        self.coefficient = rule.coefficient
        self.top_k = config.top_k
        self.factor = config.n_routed / config.top_k

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        unbiased = routing.scores.topk(self.top_k, dim=-1).indices
        f = self.factor * frequency(chosen(unbiased, routing), routing, "sequence")
        terms = (f * probability(routing, "sequence")).sum(dim=-1)
        return self.coefficient * mean_over_scope(terms, routing, "sequence")
