"""Rules that look ahead are found out, and the others see no later token through a whole model."""

from typing import Any

import pytest
import torch

from moekit.analyze.leak import future_leak
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import (
    BaseRouting,
    ExpertChoiceRouting,
    HybridRouting,
    SinkhornRouting,
    SoftRouting,
    TopKRouting,
)
from moekit.model.transformer import Transformer

CAUSAL = [
    TopKRouting(),
    BaseRouting(),
    SinkhornRouting(),
    ExpertChoiceRouting(decode="threshold"),
    HybridRouting(threshold=1.05),
]
AHEAD = [ExpertChoiceRouting(), ExpertChoiceRouting(scope="sequence"), SoftRouting(), SoftRouting(slots=2)]


def model_with(routing: Any) -> Transformer:
    """A model of three layers, after some steps' observations: thresholds and loads are those of training."""
    top_k = 1 if isinstance(routing, BaseRouting) else 2
    moe = MoEConfig(expert_width=8, n_routed=8, top_k=top_k, routing=routing)
    shape = ModelConfig(vocab_size=40, width=16, n_layers=3, dense_width=16, moe=moe, init_std=0.3)
    model = Transformer(shape, torch.Generator().manual_seed(0))
    for step in range(20):
        for layer, found in zip(model.moe_layers(), model(random_ids(step, 4, 20)).routings, strict=True):
            layer.after_step(layer.observe(found))
    return model


def random_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(100 + seed))


@pytest.mark.parametrize("routing", CAUSAL, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("cut", [1, 6, 11])
def test_a_causal_rule_sees_no_later_token(routing: Any, cut: int) -> None:
    assert routing.causal
    assert future_leak(model_with(routing), random_ids(0, 3, 12), cut) <= 1e-5


@pytest.mark.parametrize("routing", AHEAD, ids=str)
def test_a_rule_that_looks_ahead_is_found_out(routing: Any) -> None:
    assert not routing.causal
    assert future_leak(model_with(routing), random_ids(0, 3, 12), 6) > 1e-3


def test_running_loads_let_some_experts_of_the_tested_model_choose() -> None:
    for layer in model_with(HybridRouting(threshold=1.05)).moe_layers():
        assert 0 < (layer.router.rule.load > 1.05).sum() < 8


@pytest.mark.parametrize("routing", [ExpertChoiceRouting(), HybridRouting()], ids=lambda rule: rule.kind)
def test_looking_for_a_leak_leaves_the_model_as_it_was(routing: Any) -> None:
    model = model_with(routing).train()
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    future_leak(model, random_ids(0, 2, 9), 4)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert modes == [module.training for module in model.modules()]


@pytest.mark.parametrize("cut", [0, 9, -1])
def test_a_cut_with_nothing_on_one_side_is_refused(cut: int) -> None:
    with pytest.raises(InputError, match="cut"):
        future_leak(model_with(TopKRouting()), random_ids(0, 2, 9), cut)
