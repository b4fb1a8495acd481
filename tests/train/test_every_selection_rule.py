"""Every selection rule trains a whole model, is saved with its state, and generates what the model says at once."""

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from training_cases import small_model

import moekit
from moekit.config.errors import ConfigError, InputError
from moekit.config.moe import MoEConfig
from moekit.config.routing import Routing
from moekit.config.run import RunConfig, TrainSection
from moekit.model.transformer import Transformer
from moekit.train.step import Stepper

every_rule = pytest.mark.parametrize("cls", get_args(Routing), ids=lambda cls: cls.__name__)
ONE_CAUSAL_CHOICE = {"decode": "threshold"}


def config_of(cls: type) -> RunConfig:
    fields = cls.__dataclass_fields__
    rule = cls(**{name: value for name, value in ONE_CAUSAL_CHOICE.items() if name in fields})
    for top_k in (2, 1):
        try:
            moe = MoEConfig(expert_width=16, n_routed=8, top_k=top_k, routing=rule)
        except ConfigError:
            continue
        return RunConfig(model=small_model(moe=moe), train=TrainSection(steps=6, batch=4, dtype="float32"))
    raise AssertionError(cls)


def trained(config: RunConfig, steps: int = 6) -> tuple[Transformer, list[float]]:
    torch.manual_seed(0)
    model = Transformer(config.model, torch.Generator().manual_seed(0))
    stepper = Stepper(config, model)
    ids = torch.randint(0, 300, (4, 26), generator=torch.Generator().manual_seed(1))
    tasks = torch.zeros(4, dtype=torch.long)
    losses = [stepper.step(ids, number, tasks).losses["next_token"] for number in range(steps)]
    return model.eval(), losses


@every_rule
def test_training_lowers_the_loss_and_follows_the_seed_alone(cls: type) -> None:
    config = config_of(cls)
    model, losses = trained(config)
    assert losses[-1] < losses[0] - 0.05
    torch.rand(7)
    again, same = trained(config)
    assert losses == same
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_model(cls: type, dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = trained(config_of(cls), steps=2)
    model = model.to(dtype)
    moekit.save(model, tmp_path / "model")
    loaded = moekit.load(tmp_path / "model")
    assert loaded.config == model.config
    ids, tasks = torch.arange(20).view(2, 10), torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        assert torch.equal(loaded(ids, tasks=tasks).logits, model(ids, tasks=tasks).logits)


@every_rule
def test_a_token_at_a_time_gives_what_the_whole_gives_or_is_refused(cls: type) -> None:
    model, _ = trained(config_of(cls), steps=3)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    if not model.config.moe.routing.causal:
        with pytest.raises(InputError, match="later tokens"):
            moekit.generate(model, ids, max_new_tokens=2)
        return
    tasks = torch.zeros(2, dtype=torch.long)
    with torch.inference_mode():
        whole = model(ids, tasks=tasks).logits
        cache = model.new_cache(9)
        parts = [model(ids[:, n : n + 1], cache, tasks=tasks).logits for n in range(9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@every_rule
def test_the_figures_of_a_step_are_finite(cls: type) -> None:
    config = config_of(cls)
    stepper = Stepper(replace(config, train=replace(config.train, micro_batch=2)), Transformer(config.model))
    ids = torch.randint(0, 300, (4, 26), generator=torch.Generator().manual_seed(1))
    figures = stepper.step(ids, 0, torch.zeros(4, dtype=torch.long))
    assert math.isfinite(figures.gradient_norm)
    for observed in figures.observed:
        assert int(observed.tokens) == 4 * 24
        assert int(observed.load.sum()) >= int(observed.served) > 0
