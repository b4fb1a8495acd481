"""Router z-loss (arXiv 2202.08906, eq 5): coefficient * mean over tokens of logsumexp(logits)^2."""

from moekit.config.balance import RouterZLoss
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import real_tokens
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Rule(BalanceRule):
    """Keeps the router's logits small, where float rounding is fine."""

    def __init__(self, rule: RouterZLoss, config: MoEConfig) -> None:  # noqa: ARG002
        super().__init__()
        self.coefficient = rule.coefficient

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        squared = routing.logits.logsumexp(dim=-1).square()
        if routing.mask is not None:
            squared = squared * routing.mask
        return self.coefficient * squared.sum() / real_tokens(routing).sum().clamp_min(1)
