"""Configurations of equal meaning compute the same from the same weights."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from moekit.config.balance import BiasBalance
from moekit.config.errors import ConfigError
from moekit.config.families import meaning
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.model.transformer import Transformer

BASE = ModelConfig(
    vocab_size=23,
    width=12,
    n_layers=2,
    dense_layers=(),
    attention=GQAConfig(n_heads=2, n_kv_heads=1, head_dim=6),
    moe=MoEConfig(expert_width=6, n_routed=8, n_shared=1, top_k=3),
)
LATENT = MLAConfig(n_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=5)


def combinations(**choices: Iterable[Any]) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def routings() -> list[ModelConfig]:
    found = []
    for fields in combinations(
        score=["softmax", "sigmoid"],
        order=["score_then_top_k", "top_k_then_score"],
        renormalise=[False, True],
        epsilon=[0.0, 0.3],
        groups=[(1, 1), (4, 4), (4, 2), (2, 1)],
        group_score=["max", "top2_sum"],
        biased=[False, True],
    ):
        n_groups, top_k_groups = fields.pop("groups")
        balance = (BiasBalance(),) if fields.pop("biased") else ()
        routing = TopKRouting(**fields, n_groups=n_groups, top_k_groups=top_k_groups)
        found.append(replace(BASE, moe=replace(BASE.moe, routing=routing, balance=balance)))
    return found


def positions() -> list[ModelConfig]:
    return [
        replace(
            BASE,
            attention=attention,
            rope=RopeConfig(scaling=YarnConfig(factor=4.0, original_max_positions=8, **fields)),
        )
        for attention in (BASE.attention, LATENT)
        for fields in combinations(mscale=[0.5, 1.0], mscale_all_dim=[0.0, 0.5, 1.0], attention_factor=[None, 1.5])
    ]


def widths() -> list[ModelConfig]:
    found = []
    for fields in combinations(n_shared=[0, 1, 2], shared_expert_width=[0, 6, 12], shared_gate=[False, True]):
        for dense_layers, dense_width in product([(), (0,), (0, 1)], [9, 10]):
            try:
                moe = replace(BASE.moe, **fields)
            except ConfigError:
                continue
            found.append(replace(BASE, moe=moe, dense_layers=dense_layers, dense_width=dense_width))
    return found


@torch.no_grad()
def result(config: ModelConfig) -> tuple[dict[str, torch.Size], torch.Tensor]:
    """The shapes of the tensors, and logits; tensors of one name and shape hold the same numbers."""
    model = Transformer(config).eval()
    for name, tensor in sorted(model.state_dict().items()):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
    ids = torch.randint(0, 23, (2, 16), generator=torch.Generator().manual_seed(1))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}, model(ids).logits


@pytest.mark.parametrize("configs", [routings(), positions(), widths()], ids=["routing", "positions", "widths"])
def test_equal_meaning_is_equal_logits(configs: list[ModelConfig]) -> None:
    alike = defaultdict(list)
    for config in configs:
        alike[meaning(config)].append(config)
    assert len(configs) > len(alike) > 1
    for group in alike.values():
        shapes, logits = result(group[0])
        for other in group[1:]:
            found = result(other)
            assert found[0] == shapes
            torch.testing.assert_close(found[1], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [*routings()[::7], *positions()[::3], *widths()[::5]])
def test_meaning_is_a_configuration_of_its_own_meaning(config: ModelConfig) -> None:
    assert meaning(meaning(config)) == meaning(config)


def test_a_softmax_among_the_chosen_is_one_over_all_divided_by_their_sum() -> None:
    late, early = TopKRouting(order="top_k_then_score"), TopKRouting(renormalise=True)
    assert meaning(with_routing(late)) == meaning(with_routing(early))
    assert meaning(with_routing(late)) != meaning(with_routing(replace(early, epsilon=1e-20)))
    sigmoids = replace(late, score="sigmoid"), replace(early, score="sigmoid")
    assert meaning(with_routing(sigmoids[0])) != meaning(with_routing(sigmoids[1]))


def test_experts_that_no_layer_has_mean_nothing() -> None:
    dense = replace(BASE, dense_layers=(0, 1))
    assert meaning(dense) == meaning(replace(dense, moe=replace(BASE.moe, n_routed=4, balance=(BiasBalance(),))))
    assert meaning(BASE) != meaning(replace(BASE, moe=replace(BASE.moe, n_routed=4)))


def test_what_is_trained_otherwise_means_something_else() -> None:
    assert meaning(BASE) != meaning(replace(BASE, moe=replace(BASE.moe, balance=(BiasBalance(rate=0.1),))))


def with_routing(routing: TopKRouting) -> ModelConfig:
    return replace(BASE, moe=replace(BASE.moe, routing=routing))
