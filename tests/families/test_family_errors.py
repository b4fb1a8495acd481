"""What a family does not understand is told by the name of the field."""

import random
from typing import Any

import pytest
from family_shapes import their_config

from moekit.config.errors import ConfigError
from moekit.config.families import FAMILIES, family_for, family_named
from moekit.config.presets.load import load_run

NAMES = [family.model_type for family in FAMILIES if family.model_type != "moekit"]
PRESETS = {"deepseek": "deepseek-moe-16b"}


def written(family: str) -> dict[str, Any]:
    """A `config.json` as we write it."""
    found = family_named(family, "")
    config = load_run(PRESETS[family]).model if family in PRESETS else found.from_hub(their_config(family, 3).to_dict())
    data = found.to_hub(config)
    assert data is not None
    assert found.from_hub(data) is not None
    return data


def refused(family: str, **changes: Any) -> ConfigError:
    data = {key: value for key, value in (written(family) | changes).items() if value != "absent"}
    with pytest.raises(ConfigError) as caught:
        family_named(family, "").from_hub(data)
    return caught.value


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("surprise", 1, "not understood"),
        ("hidden_size", "12", "not of type int"),
        ("hidden_size", "absent", "is missing"),
        ("rms_norm_eps", "absent", "is missing"),
        ("num_attention_heads", "absent", "is missing"),
        ("num_attention_heads", 0, "above 0"),
        ("num_hidden_layers", 10**9, "at most 10000"),
        ("vocab_size", 2**70, "too large"),
        ("hidden_act", "gelu", "not supported"),
        ("attention_dropout", 0.1, "not supported"),
        ("tie_word_embeddings", 1, "not of type bool"),
        ("rope_theta", 10**400, "too large"),
        ("max_position_embeddings", 0, "above 0"),
    ],
)
def test_a_field_that_cannot_be_followed_is_named(family: str, key: str, value: Any, reason: str) -> None:
    error = refused(family, **{key: value})
    assert error.key == key
    assert reason in error.reason


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"type": "longrope", "factor": 2.0}, "rope_scaling.rope_type"),
        ({"type": "linear"}, "rope_scaling.factor"),
        ({"type": "linear", "factor": 2.0, "mscale": 1.0}, "rope_scaling.mscale"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "rope_scaling.low_freq_factor"),
        ({"rope_type": "yarn", "factor": "4"}, "rope_scaling.factor"),
        ({"rope_type": "yarn", "type": "linear", "factor": 4.0}, "rope_scaling.rope_type"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}, "original_max_positions"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "rope_scaling.full_attention"),
    ],
)
def test_a_scaling_that_cannot_be_followed_is_named(family: str, scaling: dict[str, Any], key: str) -> None:
    assert refused(family, rope_scaling=scaling, rope_theta=10000.0).key == key


OWN: list[tuple[str, dict[str, Any], str]] = [
    ("deepseek", {"head_dim": 64}, "head_dim"),
    ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek", {"moe_layer_freq": 0}, "moe_layer_freq"),
    ("deepseek", {"moekit": {"balance": {"bias": {}}}}, "moekit.balance.bias"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": None}, "n_group"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
    ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok"),
    ("deepseek_v3", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("mixtral", {"sliding_window": 63}, "sliding_window"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("mixtral", {"moekit": {"balance": {"bias": {}}}}, "moekit.balance.bias"),
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("olmoe", {"clip_qkv": -1.0}, "clip_qkv"),
    ("olmoe", {"hidden_size": 13}, "num_attention_heads"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ("qwen3_moe", {"num_local_experts": 99}, "num_experts"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("family", "changes", "key"), OWN)
def test_what_is_particular_to_a_family_is_named(family: str, changes: dict[str, Any], key: str) -> None:
    assert refused(family, **changes).key == key


def test_both_names_of_the_number_of_experts_are_read() -> None:
    data = written("qwen3_moe")
    family = family_named("qwen3_moe", "")
    other = {key: value for key, value in data.items() if key != "num_experts"}
    assert family.from_hub(other | {"num_local_experts": data["num_experts"]}) == family.from_hub(data)
    assert family.from_hub(data | {"num_local_experts": data["num_experts"]}) == family.from_hub(data)


def test_a_mixture_of_no_experts_is_dense() -> None:
    config = family_named("qwen3_moe", "").from_hub(written("qwen3_moe") | {"num_experts": 0})
    assert config.moe_layers == ()
    assert family_for(config).model_type == "qwen3"


@pytest.mark.parametrize("family", NAMES)
def test_the_preferred_family_comes_first_where_it_expresses_the_model(family: str) -> None:
    config = family_named(family, "").from_hub(written(family))
    assert family_for(config, prefer=family).model_type == family
    assert family_for(load_run("tiny").model, prefer=family).model_type == "deepseek_v3"


@pytest.mark.parametrize("family", NAMES)
def test_any_damaged_field_is_an_error_or_a_configuration(family: str) -> None:
    data, rng = written(family), random.Random(family)
    odd = [None, -1, 0, 1, 2**40, 0.5, -1e9, float("nan"), "x", [], [1], {}, {"factor": 1}, True, [[]]]
    for key in data:
        for value in odd:
            try:
                config = family_named(family, "").from_hub(data | {key: value, rng.choice(list(data)): rng.choice(odd)})
            except ConfigError as error:
                assert error.key
            else:
                assert family_for(config)
