"""Balancing rules, one file each. A new rule: its dataclass in `config/balance.py`, its file here, a line in RULES."""

from collections.abc import Iterable
from typing import cast

from torch import nn

from moekit.config import balance as rules
from moekit.config.moe import MoEConfig
from moekit.moe.balance.bias import BiasRule
from moekit.moe.balance.communication_loss import CommunicationLossRule
from moekit.moe.balance.device_loss import DeviceLossRule
from moekit.moe.balance.expert_loss import ExpertLossRule
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.sequence_loss import SequenceLossRule
from moekit.moe.balance.z_loss import ZLossRule
from moekit.tensors import Float, Tensor

RULES = {
    rules.BiasBalance: BiasRule,
    rules.ExpertLoss: ExpertLossRule,
    rules.DeviceLoss: DeviceLossRule,
    rules.CommunicationLoss: CommunicationLossRule,
    rules.SequenceLoss: SequenceLossRule,
    rules.RouterZLoss: ZLossRule,
}


def build_balance(config: MoEConfig) -> nn.ModuleDict:
    """The rules of a layer, by kind."""
    return nn.ModuleDict({rule.kind: RULES[type(rule)](rule, config) for rule in config.balance})


def active_rules(balance: nn.ModuleDict) -> Iterable[tuple[str, BalanceRule]]:
    """The rules of a layer with their kinds."""
    return cast(Iterable[tuple[str, BalanceRule]], balance.items())


def selection_bias(balance: nn.ModuleDict) -> Float[Tensor, " E"] | None:
    """The sum of what the rules add to the selection; None where no rule does."""
    biases = [bias for _, rule in active_rules(balance) if (bias := rule.bias()) is not None]
    return sum(biases[1:], biases[0]) if biases else None


__all__ = ["RULES", "BalanceRule", "StepCount", "active_rules", "build_balance", "selection_bias"]
