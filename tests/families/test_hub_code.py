"""Where transformers ignores a field that the code released with the weights follows, we follow it too."""

from dataclasses import replace
from typing import Any

import pytest
from family_shapes import their_config

from moekit.config.families import family_for, family_named
from moekit.config.model import ModelConfig


def read(family: str, **changes: Any) -> ModelConfig:
    found = family_named(family, "")
    return found.from_hub(their_config(family, 0).to_dict() | changes)


def test_the_second_version_divides_the_weights_by_their_sum_or_scales_them() -> None:
    scaled = read("deepseek_v2", norm_topk_prob=False, routed_scaling_factor=16.0).moe.routing
    normed = read("deepseek_v2", norm_topk_prob=True, routed_scaling_factor=16.0).moe.routing
    assert (scaled.renormalise, scaled.scale) == (False, 16.0)
    assert (normed.renormalise, normed.scale, normed.epsilon) == (True, 1.0, 1e-20)


def test_one_weight_is_not_divided_by_itself() -> None:
    routing = read("deepseek_v2", norm_topk_prob=True, num_experts_per_tok=1, topk_method="greedy").moe.routing
    assert not routing.renormalise


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(("first", "every", "dense"), [(0, 2, (1, 3)), (1, 2, (0, 1, 3)), (3, 3, (0, 1, 2, 4))])
def test_experts_stand_in_every_so_many_layers(family: str, first: int, every: int, dense: tuple[int, ...]) -> None:
    config = read(family, num_hidden_layers=5, first_k_dense_replace=first, moe_layer_freq=every)
    assert config.dense_layers == dense


def test_what_transformers_would_read_as_another_model_is_saved_as_our_own() -> None:
    normed = read("deepseek_v2", norm_topk_prob=True)
    spread = read("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=0, moe_layer_freq=2)
    for config, family in ((normed, "deepseek_v2"), (spread, "deepseek_v3")):
        assert family_for(config, prefer=family).model_type == "moekit"
    assert family_for(replace(spread, dense_layers=(0,)), prefer="deepseek_v3").model_type == "deepseek_v3"


def test_groups_have_no_effect_on_a_greedy_choice() -> None:
    routing = read("deepseek_v2", topk_method="greedy", n_group=4, topk_group=1).moe.routing
    assert (routing.n_groups, routing.top_k_groups) == (1, 1)
