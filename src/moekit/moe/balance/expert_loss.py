"""Expert-level balance loss (arXiv 2401.06066, eqs 12-14): coefficient * sum over experts of f_i P_i."""

from moekit.config.balance import ExpertLoss
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, mean_over_scope, probability, relative_load
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """Pulls probability away from experts with more than their share of the tokens."""

    def __init__(self, rule: ExpertLoss, config: MoEConfig) -> None:  # noqa: ARG002
        super().__init__()
        self.rule = rule
        self.counts_step = rule.scope == "batch"

    def count(self, routing: Routing) -> Int[Tensor, " E"]:
        return chosen(routing.experts, routing).sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        counts = chosen(routing.experts, routing)
        f = relative_load(counts, self.rule.scope, step)
        terms = (f * probability(routing, self.rule.scope)).sum(dim=-1)
        return self.rule.coefficient * mean_over_scope(terms, routing, self.rule.scope)
