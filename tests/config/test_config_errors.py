"""Bad input is told by its full dotted key, with what to do about it."""

from typing import Any

import pytest

from moekit.config.codec import overrides, update
from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.config.run import RunConfig

# dotted key, text given, words of the message, words of the hint
BAD = [
    ("model.moe.n_routd", "4", "unknown key", "did you mean `n_routed`?"),
    ("model.mo.top_k", "4", "unknown key", "did you mean `moe`?"),
    ("optimizer.lr", "1", "unknown key", "did you mean `optim`?"),
    ("model.moe.balance.bais.rate", "0.1", "unknown key", "did you mean `bias`?"),
    ("model.moe.balance.bias.speed", "0.1", "unknown key", "known: kind, rate"),
    ("model.width", "wide", "'wide' is not a whole number", ""),
    ("model.width", "2.5", "2.5 is not a whole number", ""),
    ("model.width", "true", "True is not a whole number", ""),
    ("optim.lr", "fast", "'fast' is not a number", ""),
    ("optim.lr", "nan", "nan is not a finite number", ""),
    ("model.tie_embeddings", "1", "1 is not true or false", ""),
    ("model.dense_layers", "0", "0 is not a list", "[0, 1]"),
    ("model.moe", "3", "3 is not a section", ""),
    ("model.moe.balance", "3", "3 is not a section", "bias"),
    ("model.attention.kind", "mlaa", "'mlaa' is not one of mla, gqa", "did you mean `mla`?"),
    ("model.moe.routing.kind", "topk", "'topk' is not one of top_k", "did you mean `top_k`?"),
    ("optim.kind", "adam", "'adam' is not one of muon, adamw", "did you mean `adamw`?"),
    ("model.moe.routing.score", "softmaks", "is not one of softmax, sigmoid", "did you mean `softmax`?"),
    ("model.moe.top_k", "17", "n_routed = 16", "at most 16"),
    ("model.moe.top_k", "0", "above 0", ""),
    ("model.moe.routing.n_groups", "3", "do not divide n_routed = 16", "divisor of 16"),
    ("model.attention.qk_rope_head_dim", "15", "must be even", "choose 16"),
    ("model.moe.balance.device_loss.n_devices", "3", "16 experts do not divide among 3 devices", ""),
    ("model.moe.balance.expert_loss.coefficient", "-1", "must not be negative", ""),
    ("model.moe.width", "64", "differs from the model's width = 256", ""),
    ("model.dense_layers", "[4]", "outside the 4 layers", ""),
    ("model.mtp_depth", "2", "is not 0 or 1", ""),
    ("train.micro_batch", "3", "does not divide batch = 16", ""),
    ("data.sources.1.path", "a", "position", ""),
]


REPORTED_AT = {
    "model.mo.top_k": "model.mo",
    "optimizer.lr": "optimizer",
    "model.moe.balance.bais.rate": "model.moe.balance.bais",
    "data.sources.1.path": "data.sources.1",
}


@pytest.mark.parametrize(("key", "text", "message", "hint"), BAD, ids=[f"{key}={text}" for key, text, *_ in BAD])
def test_an_error_names_the_full_key_the_reason_and_the_remedy(key: str, text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        update(RunConfig(), overrides([(key, text)]))
    error = caught.value
    assert error.key == REPORTED_AT.get(key, key)
    assert str(error).startswith(f"`{error.key}`: ")
    assert message in str(error)
    assert hint in error.hint


def test_a_kind_that_is_no_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not one of mla, gqa") as caught:
        update(RunConfig(), {"model": {"attention": {"kind": []}}})
    assert caught.value.key == "model.attention.kind"


def test_an_error_inside_a_list_names_the_position() -> None:
    with pytest.raises(ConfigError, match="'x' is not a whole number") as caught:
        update(RunConfig(), overrides([("model.dense_layers", "[0, 'x']")]))
    assert caught.value.key == "model.dense_layers.1"


@pytest.mark.parametrize(
    ("key", "routing"),
    [
        ("routing.top_k_groups", TopKRouting(n_groups=8, top_k_groups=1)),
        ("routing.group_score", TopKRouting(n_groups=16, top_k_groups=4, group_score="top2_sum")),
    ],
)
def test_groups_too_small_for_the_choice_are_refused(key: str, routing: TopKRouting) -> None:
    with pytest.raises(ConfigError) as caught:
        MoEConfig(n_routed=16, top_k=4, routing=routing)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("routing.renormalise", {"renormalise": True}),
        ("routing.renormalise", {"renormalise": True, "score": "sigmoid"}),
        ("routing.order", {"order": "top_k_then_score"}),
    ],
)
def test_one_expert_per_token_with_a_constant_weight_is_not_trained(key: str, settings: dict[str, Any]) -> None:
    moe = MoEConfig(n_routed=8, top_k=1, routing=TopKRouting(**settings))
    with pytest.raises(ConfigError, match="no gradient") as caught:
        RunConfig(model=ModelConfig(moe=moe))
    assert caught.value.key == f"model.moe.{key}"
    assert caught.value.hint
    assert RunConfig(model=ModelConfig(moe=moe, n_layers=1, dense_layers=(0,)))


def test_one_expert_per_token_with_its_own_score_as_weight_is_allowed() -> None:
    assert RunConfig(model=ModelConfig(moe=MoEConfig(n_routed=8, top_k=1))).model.moe.top_k == 1


def test_a_rule_given_twice_is_refused() -> None:
    rule = update(RunConfig(), overrides([("model.moe.balance.bias.rate", "0.1")])).model.moe.balance[0]
    with pytest.raises(ConfigError, match="bias is given twice"):
        MoEConfig(balance=(rule, rule))


def test_a_value_where_a_section_is_wanted_is_not_dropped_by_a_later_override() -> None:
    with pytest.raises(ConfigError, match="'gqa' is not a section") as caught:
        overrides([("model.attention", "gqa"), ("model.attention.n_heads", "8")])
    assert caught.value.key == "model.attention"
