"""Families that moekit counts and does not run, held to transformers' own models and to released files."""

import random
from typing import Any

import plan_released_shapes as released
import pytest
from plan_family_shapes import SEEDS, SHAPES, transformers_count

from moekit.config.errors import ConfigError
from moekit.plan.families import READERS, read_family
from moekit.plan.parameters import parameters


def count(config: dict[str, Any], key: str = "stored.total") -> Any:
    return parameters(read_family(config, "model")).value(key)


def test_every_family_is_held_to_transformers() -> None:
    assert SHAPES.keys() == READERS.keys()


@pytest.mark.parametrize("model_type", SHAPES)
def test_random_models_count_as_in_transformers(model_type: str) -> None:
    for seed in SEEDS:
        expected, config = transformers_count(model_type, SHAPES[model_type](random.Random(seed)))
        assert count(config) == expected, (seed, config)


DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4_moe": {},
    "gpt_oss": {},
    # The class defaults of these two build no model.
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "hunyuan_v1_moe": {"head_dim": 128},
    "phimoe": {},
    "granitemoe": {},
    "ernie4_5_moe": {},
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_the_default_model_counts_as_in_transformers(model_type: str) -> None:
    expected, config = transformers_count(model_type, DEFAULTS[model_type])
    assert count(config, "stored.without_prediction") == expected


# Numbers in the released files, where the hub tells them, and elsewhere what transformers builds from their
# config.json; active parameters in billions by the convention of the publisher.
RELEASED = [
    ("GLM_4_5", "stored.without_prediction", 352_797_829_024, "active.without_embeddings", 32),
    ("GLM_4_5_AIR", "stored.without_prediction", 106_852_251_264, "active.without_embeddings", 12),
    ("GPT_OSS_20B", "stored.total", 20_914_757_184, "active.without_input_embedding", 3.6),
    ("GPT_OSS_120B", "stored.total", 116_829_156_672, "active.without_input_embedding", 5.1),
    ("DBRX", "stored.total", 131_596_523_520, "active.all", 36),
    ("PHI_3_5_MOE", "stored.total", 41_873_153_344, "active.all", 6.6),
    ("GRANITE_1B", "stored.total", 1_334_628_352, "active.all", 0.4),
    ("GRANITE_3B", "stored.total", 3_298_793_472, "active.without_embeddings", 0.8),
    ("ERNIE_21B", "stored.without_prediction", 21_825_437_888, "active.without_embeddings", 3),
    ("HUNYUAN_A13B", "stored.total", 80_393_183_232, "active.all", 13),
]


@pytest.mark.parametrize(("name", "key", "stored", "convention", "active"), RELEASED)
def test_a_released_model_counts_to_the_digit(name: str, key: str, stored: int, convention: str, active: float) -> None:
    config = getattr(released, name)
    assert count(config, key) == stored
    places = 0 if isinstance(active, int) else 1
    assert round(count(config, convention) / 1e9, places) == active


def test_gpt_oss_20b_counts_as_published() -> None:
    config = released.GPT_OSS_20B
    assert count(config, "active.all") == 4_187_440_704
    assert count(config, "active.without_input_embedding") == 3_608_307_264
    assert count(config, "per_expert") == 24_891_840
    assert count(config, "stored.attention") == 24 * 26_550_144


def test_files_of_glm_hold_the_prediction_module_with_copies_of_embedding_and_head() -> None:
    whole = {name: count(getattr(released, name)) for name in ("GLM_4_5", "GLM_4_5_AIR")}
    copies = {name: count(getattr(released, name), "stored.file_copies") for name in whole}
    assert whole["GLM_4_5"] + copies["GLM_4_5"] == 358_337_791_296
    assert whole["GLM_4_5_AIR"] + copies["GLM_4_5_AIR"] == 110_468_824_832


def test_the_prediction_module_of_ernie_is_dense() -> None:
    attention, dense, width = 2 * 2560 * 2560 + 2 * 512 * 2560, 3 * 2560 * 12288, 2560
    assert count(released.ERNIE_21B, "stored.prediction") == attention + dense + 2 * width**2 + 4 * width


def test_gpt_oss_sees_a_window_in_every_other_layer() -> None:
    blueprint = read_family(released.GPT_OSS_20B, "model")
    assert [(shape.window, shape.layers) for shape in blueprint.attentions] == [(128, 12), (None, 12)]
    assert blueprint.quantisation == "mxfp4"


def test_layers_of_different_experts_are_different_mixtures() -> None:
    config = released.HUNYUAN_A13B | {
        "moe_topk": [8] * 30 + [4] * 2,
        "moe_intermediate_size": [3072] * 31 + [1536],
        "num_shared_expert": [1] * 31 + [2],
        "moe_layer_num_skipped": 1,
    }
    blueprint = read_family(config, "model")
    found = [(mixture.layers, mixture.top_k, mixture.expert, mixture.shared) for mixture in blueprint.mixtures]
    expert = 3 * 4096 * 3072
    assert found == [(29, 8, expert, expert), (1, 4, expert, expert), (1, 4, expert // 2, expert)]
    figures = parameters(blueprint)
    assert figures.value("combinations") == 4_426_165_368
    assert figures.value("combinations_2") == 635_376
    assert count(config, "stored.dense") == expert


@pytest.mark.parametrize("name", [row[0] for row in RELEASED])
def test_a_field_that_is_not_known_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="extra_experts"):
        read_family(getattr(released, name) | {"extra_experts": 4}, "model")


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("GLM_4_5", {"hidden_size": None}, "hidden_size"),
    ("GLM_4_5", {"num_experts_per_tok": 161}, "num_experts_per_tok"),
    ("GLM_4_5", {"n_group": 7}, "n_groups"),
    ("GLM_4_5", {"n_group": 160}, "top_k_groups"),
    ("GLM_4_5", {"num_key_value_heads": 7}, "num_key_value_heads"),
    ("GLM_4_5", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ("GLM_4_5", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("GPT_OSS_20B", {"layer_types": ["full_attention"]}, "layer_types"),
    ("GPT_OSS_20B", {"layer_types": ["linear_attention"] * 24}, "layer_types"),
    ("GPT_OSS_20B", {"sliding_window": 0}, "sliding_window"),
    ("GPT_OSS_20B", {"experts_per_token": 5}, "experts_per_token"),
    ("GPT_OSS_20B", {"quantization_config": {"bits": 4}}, "quantization_config.quant_method"),
    ("DBRX", {"attn_config": {"kv_n_heads": 8, "rotary_dim": 4}}, "attn_config.rotary_dim"),
    ("DBRX", {"ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 2, "moe_top_k": 3}}, "ffn_config.moe_top_k"),
    ("DBRX", {"ffn_config": 4}, "ffn_config"),
    ("ERNIE_21B", {"moe_use_aux_free": False}, "moe_use_aux_free"),
    ("ERNIE_21B", {"moe_num_experts": [64, 64]}, "moe_num_experts"),
    ("ERNIE_21B", {"moe_layer_interval": 0}, "moe_layer_interval"),
    ("HUNYUAN_A13B", {"moe_topk": [8] * 31}, "moe_topk"),
    ("HUNYUAN_A13B", {"moe_topk": [65] * 32}, "moe_topk"),
    ("HUNYUAN_A13B", {"moe_topk": ["8"] * 32}, "moe_topk"),
    ("HUNYUAN_A13B", {"use_mla": True}, "use_mla"),
    ("HUNYUAN_A13B", {"attention_head_dim": 64}, "attention_head_dim"),
]


@pytest.mark.parametrize(("name", "change", "key"), WRONG)
def test_an_error_names_the_field(name: str, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_family(getattr(released, name) | change, "model")
    assert caught.value.key == key
