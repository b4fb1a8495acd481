"""Expert-level balance loss (arXiv 2401.06066, eqs 12-14): coefficient * sum over experts of f_i P_i."""

from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, mean_over_scope, probability, relative_load
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """Pulls probability away from experts with more than their share of the tokens."""

    def choices(self, routing: Routing) -> Int[Tensor, "T K"]:
        """The choices that make up f."""
        return routing.experts

    def count(self, routing: Routing) -> Int[Tensor, " E"]:
        return chosen(self.choices(routing), routing).sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        scope = self.rule.scope
        f = relative_load(chosen(self.choices(routing), routing), self.pools, scope, step)
        terms = (f * probability(routing, self.pools, scope)).sum(dim=-1)
        return self.rule.coefficient * mean_over_scope(terms, routing, scope)
