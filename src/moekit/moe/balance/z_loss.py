"""Router z-loss (arXiv 2202.08906, eq 5): coefficient * mean over tokens of logsumexp(logits)^2."""

from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import mean_over_tokens
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Rule(BalanceRule):
    """Keeps the router's logits small, where float rounding is fine."""

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        squared = routing.logits.logsumexp(dim=-1).square()
        return self.rule.coefficient * mean_over_tokens(squared, routing)
