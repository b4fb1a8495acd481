"""Communication balance loss (arXiv 2405.04434, eqs 29-31): each device should receive equally many tokens."""

import torch

from moekit.config.balance import CommunicationLoss
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import count_by_sequence, frequency, mean_over_scope, probability
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """f'' counts the tokens sent to a device, once however many of its experts they use; P'' sums P."""

    def __init__(self, rule: CommunicationLoss, config: MoEConfig) -> None:
        super().__init__()
        self.rule = rule
        self.experts_per_device = config.n_routed // rule.n_devices
        self.counts_step = rule.scope == "batch"

    def _sent(self, routing: Routing) -> Int[Tensor, "B N"]:
        devices = devices_reached(routing, self.experts_per_device)
        return count_by_sequence(devices, self.rule.n_devices, routing)

    def count(self, routing: Routing) -> Int[Tensor, " N"]:
        return self._sent(routing).sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        rule = self.rule
        f = rule.n_devices / rule.max_devices * frequency(self._sent(routing), routing, rule.scope, step)
        p = probability(routing, rule.scope).unflatten(-1, (rule.n_devices, -1)).sum(dim=-1)
        return rule.coefficient * mean_over_scope((f * p).sum(dim=-1), routing, rule.scope)


def devices_reached(routing: Routing, experts_per_device: int) -> Int[Tensor, "T K"]:
    """The devices whose experts a token uses, each once; -1 fills the row."""
    devices = torch.where(routing.experts >= 0, routing.experts // experts_per_device, -1).sort(dim=-1).values
    repeated = devices[:, 1:] == devices[:, :-1]
    return torch.cat([devices[:, :1], devices[:, 1:].masked_fill(repeated, -1)], dim=-1)
