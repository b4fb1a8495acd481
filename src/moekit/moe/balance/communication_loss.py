"""Communication balance loss (arXiv 2405.04434, eqs 29-31): each device should receive equally many tokens."""

import torch

from moekit.moe.balance.device_loss import by_device
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import count_by_sequence, frequency, mean_over_scope, probability
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """f'' counts the tokens sent to a device, once however many of its experts they use; P'' sums P."""

    def _sent(self, routing: Routing) -> Int[Tensor, "B N"]:
        devices = devices_reached(routing, self.config.n_routed, self.rule.n_devices)
        return count_by_sequence(devices, self.rule.n_devices, routing)

    def count(self, routing: Routing) -> Int[Tensor, " N"]:
        return self._sent(routing).sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        rule, per_device = self.rule, self.config.n_routed // self.rule.n_devices
        f = rule.n_devices / rule.max_devices * frequency(self._sent(routing), routing, rule.scope, step)
        p = by_device(probability(routing, self.pools, rule.scope), rule.n_devices, per_device).sum(dim=(1, 3))
        return rule.coefficient * mean_over_scope((f * p).sum(dim=-1), routing, rule.scope)


def devices_reached(routing: Routing, n_routed: int, n_devices: int) -> Int[Tensor, "T K"]:
    """The devices whose experts a token uses, each once; -1 fills the row."""
    holder = routing.experts % n_routed // (n_routed // n_devices)
    devices = torch.where(routing.experts >= 0, holder, -1).sort(dim=-1).values
    repeated = devices[:, 1:] == devices[:, :-1]
    return torch.cat([devices[:, :1], devices[:, 1:].masked_fill(repeated, -1)], dim=-1)
