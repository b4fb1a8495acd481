from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moekit.config.routing import TaskRouting
from moekit.config.run import RunConfig
from moekit.data.corpus import prepare
from moekit.model.transformer import Transformer
from moekit.train.loop import Run
from moekit.train.metrics import read_metrics
from moekit.train.step import DivergedError, Stepper


def ids() -> torch.Tensor:
    return torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(3))


def test_an_infinite_activation_stops_the_step_and_names_the_layer(small_run: RunConfig) -> None:
    stepper = Stepper(small_run, Transformer(small_run.model, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        stepper.model.layers[1].attention.out.weight.fill_(float("inf"))
    before = {name: p.detach().clone() for name, p in stepper.weights.masters.items()}
    with pytest.raises(DivergedError, match=r"step 6: the output of layer 1 is not finite"):
        stepper.step(ids(), 5)
    assert all(torch.equal(p.detach(), before[name]) for name, p in stepper.weights.masters.items())


def test_an_infinite_gradient_stops_the_step_and_names_the_parameter(small_run: RunConfig) -> None:
    stepper = Stepper(small_run, Transformer(small_run.model, torch.Generator().manual_seed(0)))
    weight = stepper.model.layers[2].feed_forward.experts.down
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match=r"the gradient of layers\.2\.feed_forward\.experts\.down is not finite"):
        stepper.step(ids(), 0)


def test_a_step_of_several_tasks_names_the_layer_too(small_run: RunConfig) -> None:
    moe = replace(small_run.model.moe, routing=TaskRouting(n_tasks=2, n_common=2), balance=())
    run = replace(small_run, model=replace(small_run.model, moe=moe))
    stepper = Stepper(run, Transformer(run.model, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        stepper.model.layers[1].attention.out.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the output of layer 1"):
        stepper.step(ids(), 5, torch.arange(8) % 2)


class Saboteur:
    """Makes the fifth step fail."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    def stepped(self, row: dict) -> None:
        if row["step"] == 5:
            with torch.no_grad():
                self.stepper.model.layers[0].attention.out.weight.fill_(float("nan"))

    def stopping(self) -> bool:
        return False


def test_a_diverged_run_keeps_its_last_good_checkpoint(small_run: RunConfig, tmp_path: Path) -> None:
    corpus = prepare(small_run.data, small_run.model.vocab_size, tmp_path / "cache")
    training = Run(small_run, corpus, tmp_path / "run", resume=False)
    with pytest.raises(DivergedError, match="step 6"):
        training.train(Saboteur(training.stepper))
    resumed = Run(small_run, corpus, tmp_path / "run", resume=True)
    assert resumed.progress.step == 4
    assert all(p.isfinite().all() for p in resumed.stepper.weights.masters.values())


def test_training_makes_the_loss_fall(small_run: RunConfig) -> None:
    stepper = Stepper(small_run, Transformer(small_run.model, torch.Generator().manual_seed(0)))
    losses = [stepper.step(ids(), number).losses["next_token"] for number in range(12)]
    assert losses[-1] < losses[0] - 0.5


def test_a_run_killed_before_its_folder_showed_the_last_checkpoint_shows_it_when_resumed(
    small_run: RunConfig, tmp_path: Path
) -> None:
    corpus = prepare(small_run.data, small_run.model.vocab_size, tmp_path / "cache")
    Run(small_run, corpus, tmp_path / "run", resume=False).train(Onlooker())
    shown = tmp_path / "run" / "model.safetensors"
    weights = shown.read_bytes()
    shown.unlink()
    assert Run(small_run, corpus, tmp_path / "run", resume=True).train(Onlooker())
    assert shown.read_bytes() == weights


class Onlooker:
    def stepped(self, row: dict) -> None:
        pass

    def stopping(self) -> bool:
        return False


def test_tensorboard_holds_the_rows_of_the_metrics(small_run: RunConfig, tmp_path: Path) -> None:
    config = replace(small_run, train=replace(small_run.train, tensorboard=True))
    corpus = prepare(config.data, config.model.vocab_size, tmp_path / "cache")
    Run(config, corpus, tmp_path / "run", resume=False).train(Onlooker())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert events.Scalars("max_violation/layer_1")
