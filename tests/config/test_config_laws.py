"""What holds for every configuration."""

import dataclasses
from math import comb

import pytest
from config_strategies import Recipe, counts, moe_layers
from hypothesis import given
from hypothesis import strategies as st

from moekit.config.balance import BiasBalance
from moekit.config.errors import ConfigError
from moekit.config.model import Llama3Config, ModelConfig, RopeConfig, YarnConfig
from moekit.config.moe import MoEConfig, split
from moekit.config.routing import TopKRouting
from moekit.config.run import RunConfig


def expert_parameters(config: MoEConfig, experts: int) -> int:
    return 3 * config.expert_width * experts


@pytest.mark.parametrize("config", [RunConfig(), ModelConfig(), MoEConfig(), TopKRouting(), BiasBalance()])
def test_a_configuration_cannot_be_changed(config: object) -> None:
    name = dataclasses.fields(config)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, None)


@given(moe_layers(), st.integers(1, 8), counts)
def test_a_split_keeps_the_parameters_and_the_work_of_experts(recipe: Recipe, m: int, width: int) -> None:
    drawn = recipe.make()
    coarse = dataclasses.replace(drawn, expert_width=width * m, shared_expert_width=drawn.shared_expert_width * m)
    fine = split(coarse, m)
    assert fine.shared_width == coarse.shared_width
    for count in ("n_routed", "n_shared", "top_k"):
        assert expert_parameters(fine, getattr(fine, count)) == expert_parameters(coarse, getattr(coarse, count))


@given(moe_layers(), st.integers(2, 8))
def test_a_split_never_reduces_the_combinations_of_experts(recipe: Recipe, m: int) -> None:
    coarse = dataclasses.replace(recipe.make(), expert_width=64 * m, shared_expert_width=0)
    fine = split(coarse, m)
    assert comb(fine.n_routed, fine.top_k) >= comb(coarse.n_routed, coarse.top_k)


def test_a_split_of_16_experts_by_4_has_the_combinations_of_the_paper() -> None:
    coarse = MoEConfig(n_routed=16, n_shared=0, top_k=2)
    fine = split(coarse, 4)
    assert comb(coarse.n_routed, coarse.top_k) == 120
    assert comb(fine.n_routed, fine.top_k) == 4_426_165_368


def test_a_split_keeps_routing_and_balance() -> None:
    config = MoEConfig(routing=TopKRouting(scale=2.5), balance=(BiasBalance(),))
    fine = split(config, 2)
    assert (fine.routing, fine.balance) == (config.routing, config.balance)


@pytest.mark.parametrize("key", ["expert_width", "shared_expert_width"])
def test_a_split_that_does_not_divide_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="64 does not divide by 3") as caught:
        split(MoEConfig(**{"expert_width": 66, "shared_expert_width": 66} | {key: 64}), 3)
    assert caught.value.key == key


def test_shared_experts_may_have_a_width_of_their_own() -> None:
    assert MoEConfig(expert_width=8, n_shared=2).shared_width == 16
    assert MoEConfig(expert_width=8, n_shared=2, shared_expert_width=5).shared_width == 10
    assert MoEConfig(expert_width=8, n_shared=0, shared_expert_width=5).shared_width == 0


def test_yarn_needs_a_base_above_one() -> None:
    with pytest.raises(ConfigError, match="above 1"):
        RopeConfig(theta=1.0, scaling=YarnConfig())


def test_llama_3_needs_a_slow_and_a_fast_end() -> None:
    with pytest.raises(ConfigError, match="above low_freq_factor"):
        Llama3Config(low_freq_factor=4.0)


def test_dense_and_mixture_layers_make_up_the_model() -> None:
    config = ModelConfig(n_layers=6, dense_layers=(0, 3))
    assert config.moe_layers == (1, 2, 4, 5)


def test_the_mixture_takes_the_width_of_its_model() -> None:
    assert ModelConfig(width=48).moe_block.width == 48
