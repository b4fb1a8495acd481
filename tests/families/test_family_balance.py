"""What keeps the load even survives a folder of any family, and is the published rule where the folder says nothing."""

from dataclasses import replace
from typing import Any

import pytest

from moekit.config.balance import BalanceRule, BiasBalance, DeviceLoss, ExpertLoss, RouterZLoss
from moekit.config.families import family_for, family_named
from moekit.config.model import ModelConfig
from moekit.config.presets.load import load_run

PRESETS = {
    "deepseek": "deepseek-moe-16b",
    "deepseek_v2": "deepseek-v2-lite",
    "deepseek_v3": "deepseek-v3",
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-1b-7b",
    "qwen2_moe": "qwen1.5-moe-a2.7b",
    "qwen3_moe": "qwen3-30b-a3b",
}
RULES: list[tuple[BalanceRule, ...]] = [
    (),
    (RouterZLoss(coefficient=0.5),),
    (ExpertLoss(coefficient=0.25, scope="batch"), DeviceLoss(n_devices=2)),
]


def config_of(family: str, *rules: BalanceRule) -> ModelConfig:
    config = load_run(PRESETS[family]).model
    return replace(config, moe=replace(config.moe, balance=rules))


def written(config: ModelConfig, family: str, **changes: Any) -> dict[str, Any]:
    data = family_named(family, "").to_hub(config)
    assert data is not None
    return data | changes


@pytest.mark.parametrize("rules", RULES, ids=["none", "one", "two"])
@pytest.mark.parametrize("family", PRESETS)
def test_the_rules_of_a_run_are_written_and_read(family: str, rules: tuple[BalanceRule, ...]) -> None:
    config = config_of(family, *rules)
    assert family_for(config).model_type == family
    assert family_named(family, "").from_hub(written(config, family)).moe.balance == config.moe.balance


@pytest.mark.parametrize("family", PRESETS)
def test_a_selection_bias_goes_where_there_is_room_for_it(family: str) -> None:
    expected = family if family == "deepseek_v3" else "moekit"
    assert family_for(config_of(family, BiasBalance()), prefer=family).model_type == expected


@pytest.mark.parametrize("family", PRESETS)
def test_without_our_section_the_rules_are_the_published_ones(family: str) -> None:
    config = load_run(PRESETS[family]).model
    assert family_named(family, "").from_hub(written(config, family, moekit=None)).moe.balance == config.moe.balance


@pytest.mark.parametrize("family", ["deepseek", "deepseek_v2"])
def test_the_loss_that_a_file_names_is_read(family: str) -> None:
    def rules(**changes: Any) -> tuple[BalanceRule, ...]:
        data = written(config_of(family), family, moekit=None, **changes)
        return family_named(family, "").from_hub(data).moe.balance

    assert rules(aux_loss_alpha=0.5, seq_aux=True) == (ExpertLoss(coefficient=0.5, scope="sequence"),)
    assert rules(aux_loss_alpha=0.5, seq_aux=False) == (ExpertLoss(coefficient=0.5, scope="micro_batch"),)
    assert rules(aux_loss_alpha=0.0) == ()
