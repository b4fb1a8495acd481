"""Balancing rules, one file each, named by their kind: `Rule` of `moekit.moe.balance.<kind>`."""

import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any, cast

from torch import nn

from moekit.config.moe import MoEConfig
from moekit.kernels.choice import Steering
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.tensors import Float, Tensor


def build_balance(config: MoEConfig) -> nn.ModuleDict:
    """The rules of a layer, by kind."""
    return nn.ModuleDict({rule.kind: build_rule(rule, config) for rule in config.balance})


def build_rule(rule: Any, config: MoEConfig) -> BalanceRule:
    """The balancing rule that the dataclass `rule` of `moekit.config.balance` stands for."""
    return import_module(f"{__name__}.{rule.kind}").Rule(rule, config)


def active_rules(balance: nn.ModuleDict) -> Iterable[tuple[str, BalanceRule]]:
    """The rules of a layer with their kinds."""
    return cast(Iterable[tuple[str, BalanceRule]], balance.items())


def selection_bias(balance: nn.ModuleDict) -> Float[Tensor, " E"] | None:
    """The sum of what the rules add to the selection; None where no rule does."""
    biases = [bias for _, rule in active_rules(balance) if (bias := rule.bias()) is not None]
    return sum(biases[1:], biases[0]) if biases else None


def selection_factor(balance: nn.ModuleDict) -> Float[Tensor, " E"] | None:
    """The product of what the rules multiply the scores with at the selection; None where no rule does."""
    factors = [factor for _, rule in active_rules(balance) if (factor := rule.factor()) is not None]
    return math.prod(factors[1:], start=factors[0]) if factors else None


def steering(balance: nn.ModuleDict) -> Steering:
    """What the rules of a layer do to the selection: bias and factor."""
    return (selection_bias(balance), selection_factor(balance)) if balance else (None, None)


__all__ = [
    "BalanceRule",
    "StepCount",
    "active_rules",
    "build_balance",
    "build_rule",
    "selection_bias",
    "selection_factor",
    "steering",
]
