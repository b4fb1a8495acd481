"""The planner counts the parameters of every selection rule, and the combinations that its pools leave."""

import math
from typing import get_args

import pytest
import torch

from moekit.config.balance import BiasBalance
from moekit.config.capacity import Capacity
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import Routing, TopKRouting, TwoPoolRouting
from moekit.model.transformer import Transformer
from moekit.plan.from_config import blueprint_of
from moekit.plan.parameters import parameters


def model_with(cls: type, **settings: object) -> ModelConfig:
    for top_k in (2, 1):
        try:
            moe = MoEConfig(n_routed=8, top_k=top_k, expert_width=16, routing=cls(), **settings)
        except ConfigError:
            continue
        return ModelConfig(vocab_size=100, width=32, n_layers=3, dense_width=48, moe=moe, mtp_depth=1)
    raise AssertionError(cls)


def figures(config: ModelConfig) -> dict[str, object]:
    return {figure.key: figure.value for figure in parameters(blueprint_of(config, "a model", "moekit")).figures}


@pytest.mark.parametrize("cls", get_args(Routing), ids=lambda cls: cls.__name__)
def test_stored_and_active_parameters_are_those_of_the_model(cls: type) -> None:
    config = model_with(cls)
    with torch.device("meta"):
        size = Transformer(config).size()
    found = figures(config)
    assert found["stored.total"] == size.stored
    assert found["active.all"] == size.active


@pytest.mark.parametrize("capacity", get_args(Capacity), ids=lambda cls: cls.__name__)
def test_what_capacities_and_biases_keep_is_counted(capacity: type) -> None:
    config = model_with(TopKRouting, capacity=capacity(), balance=(BiasBalance(until_step=9),))
    with torch.device("meta"):
        size = Transformer(config).size()
    assert figures(config)["stored.total"] == size.stored


def test_two_pools_reach_the_product_of_their_combinations() -> None:
    moe = MoEConfig(n_routed=64, top_k=2, routing=TwoPoolRouting(n_common=4), balance=(BiasBalance(),))
    assert figures(ModelConfig(moe=moe))["combinations"] == math.comb(4, 1) * math.comb(60, 1) == 240
