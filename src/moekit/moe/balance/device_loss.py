"""Device-level balance loss (arXiv 2401.06066, eqs 15-17): balance among devices, not among all experts."""

from moekit.config.balance import DeviceLoss
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, mean_over_scope, probability, relative_load
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """f' is the mean of f over a device's experts, P' the sum of P."""

    def __init__(self, rule: DeviceLoss, config: MoEConfig) -> None:  # noqa: ARG002
        super().__init__()
        self.rule = rule
        self.counts_step = rule.scope == "batch"

    def count(self, routing: Routing) -> Int[Tensor, " E"]:
        return chosen(routing.experts, routing).sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        devices = (self.rule.n_devices, -1)
        counts = chosen(routing.experts, routing)
        f = relative_load(counts, self.rule.scope, step).unflatten(-1, devices).mean(dim=-1)
        p = probability(routing, self.rule.scope).unflatten(-1, devices).sum(dim=-1)
        return self.rule.coefficient * mean_over_scope((f * p).sum(dim=-1), routing, self.rule.scope)
