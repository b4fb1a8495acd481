"""Device-level balance loss (arXiv 2401.06066, eqs 15-17): balance among devices, not among all experts."""

from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import chosen, mean_over_scope, probability, relative_load
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """f' is the mean of f over a device's experts, P' the sum of P."""

    def count(self, routing: Routing) -> Int[Tensor, " E"]:
        return chosen(routing.experts, routing).sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        rule, per_device = self.rule, self.config.n_routed // self.rule.n_devices
        f = relative_load(chosen(routing.experts, routing), self.pools, rule.scope, step)
        f = by_device(f, rule.n_devices, per_device).mean(dim=(1, 3))
        p = by_device(probability(routing, self.pools, rule.scope), rule.n_devices, per_device).sum(dim=(1, 3))
        return rule.coefficient * mean_over_scope((f * p).sum(dim=-1), routing, rule.scope)


def by_device(values: Float[Tensor, "G X"], n_devices: int, per_device: int) -> Float[Tensor, "G M N Q"]:
    """What the router scores as [group, matrix, device, place there]: a device holds whole experts.

    There is one matrix for each expert, but with `projection` routing three: gates, then ups, then downs.
    """
    return values.unflatten(-1, (-1, n_devices, per_device))
