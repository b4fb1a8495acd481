"""Balancing rules in `config.json`, where the hub has no words for them: our own section, or what was published."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from moekit.config.balance import BalanceRule, BiasBalance, ExpertLoss
from moekit.config.codec import to_dict, update
from moekit.config.errors import ConfigError, check
from moekit.config.families.hub import HubFields
from moekit.config.moe import MoEConfig


def balanced(fields: HubFields, moe: MoEConfig, published: Iterable[BalanceRule], biased: bool = False) -> MoEConfig:
    """`moe` with the rules that the file's own section names, or without one those of the released models.

    `biased`: whether the family's checkpoints have room for a selection bias.
    """
    fields.ignore("moekit")
    own = fields.data.get("moekit")
    if own is None:
        return replace(moe, balance=tuple(published))
    check(isinstance(own, dict) and own.keys() <= {"balance"}, "moekit", "may hold `balance` alone")
    try:
        found = update(moe, own)
    except ConfigError as error:
        raise error.inside("moekit") from None
    room = biased or not any(isinstance(rule, BiasBalance) for rule in found.balance)
    check(room, "moekit.balance.bias", "this family's checkpoints hold no selection bias")
    return found


def write_balance(moe: MoEConfig) -> dict[str, Any]:
    """What training needs and other readers ignore."""
    return {"moekit": {"balance": to_dict(moe)["balance"]}}


def read_expert_loss(fields: HubFields) -> tuple[BalanceRule, ...]:
    """The expert-level loss of DeepSeek V1 and V2, which their files name."""
    coefficient, scope = fields.get("aux_loss_alpha", float, 0.001), fields.get("seq_aux", bool, True)
    if coefficient == 0:
        return ()
    return (ExpertLoss(coefficient=coefficient, scope="sequence" if scope else "micro_batch"),)


def write_expert_loss(moe: MoEConfig) -> dict[str, Any]:
    """The fields `read_expert_loss` reads."""
    found = next((rule for rule in moe.balance if isinstance(rule, ExpertLoss)), ExpertLoss(coefficient=0.0))
    return {"aux_loss_alpha": found.coefficient, "seq_aux": found.scope == "sequence"}
