"""The router's own learning rate and warm-up, and steps in which it or the experts stand still."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import small_model

from moekit.config.codec import overrides, update
from moekit.config.errors import ConfigError
from moekit.config.run import OptimConfig, RouterOptim, RunConfig
from moekit.data.corpus import prepare
from moekit.model.transformer import Transformer
from moekit.train.loop import Run
from moekit.train.optimizer import Optimizers, schedule
from moekit.train.step import Stepper

NAMES = {
    "layers.1.feed_forward.router.centroids": (8, 4),
    "layers.1.feed_forward.router.rule.noise": (8, 4),
    "layers.1.feed_forward.router.rule.offset": (8,),
    "layers.1.feed_forward.experts.gate_up": (8, 6, 4),
    "layers.1.feed_forward.experts.down": (8, 4, 3),
    "layers.1.feed_forward.shared_gate.weight": (1, 4),
    "layers.1.attention_norm.weight": (4,),
    "embedding.weight": (9, 4),
}
ROUTER = tuple(name for name in NAMES if ".router." in name)
STEPS = 6


def ids() -> torch.Tensor:
    return torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(3))


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in NAMES.items()}


def moved(config: OptimConfig) -> dict[str, torch.Tensor]:
    """Where `STEPS` steps along random gradients lead."""
    parameters = {name: value.requires_grad_() for name, value in random_tensors(0).items()}
    optimizers = Optimizers(config, parameters)
    for number in range(STEPS):
        for name, gradient in random_tensors(number + 1).items():
            parameters[name].grad = gradient
        optimizers.step(number, STEPS)
    return {name: p.detach() for name, p in parameters.items()}


def by_torch(name: str, peak: float, config: OptimConfig, warmup_steps: int) -> torch.Tensor:
    """The same for one parameter with torch's AdamW alone."""
    parameter = random_tensors(0)[name].requires_grad_()
    decay = config.weight_decay if parameter.dim() > 1 else 0.0
    betas = (config.beta1, config.beta2)
    adam = torch.optim.AdamW([parameter], peak, betas, eps=1e-10, weight_decay=decay, fused=True)
    for number in range(STEPS):
        parameter.grad = random_tensors(number + 1)[name]
        adam.param_groups[0]["lr"] = peak * schedule(replace(config, warmup_steps=warmup_steps), number, STEPS)
        adam.step()
    return parameter.detach()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("router", [RouterOptim(), RouterOptim(lr=0.3), RouterOptim(lr=0.3, warmup_steps=4)])
def test_routers_move_as_adamw_alone_would_at_their_rate_and_warm_up(kind: str, router: RouterOptim) -> None:
    config = OptimConfig(kind=kind, lr=0.01, adam_lr=0.02, warmup_steps=2, router=router)  # type: ignore[arg-type]
    peak = router.lr or (0.02 if kind == "muon" else 0.01)
    found = moved(config)
    for name in ROUTER:
        expected = by_torch(name, peak, config, router.warmup_steps or 2)
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_rate_for_routers_leaves_all_else_bit_for_bit(kind: str) -> None:
    plain = OptimConfig(kind=kind, warmup_steps=2)  # type: ignore[arg-type]
    found, expected = moved(replace(plain, router=RouterOptim(lr=0.3, warmup_steps=5))), moved(plain)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES if name not in ROUTER)
    assert not any(torch.equal(found[name], expected[name]) for name in ROUTER)


def test_routers_still_warm_up_when_the_rest_has() -> None:
    start, parameters = random_tensors(0), {name: value.requires_grad_() for name, value in random_tensors(0).items()}
    optimizers = Optimizers(OptimConfig(warmup_steps=1, router=RouterOptim(warmup_steps=100)), parameters)
    for name, gradient in random_tensors(1).items():
        parameters[name].grad = gradient
    assert optimizers.step(0, 1000) == 1.0
    name = "layers.1.feed_forward.router.rule.offset"
    # AdamW's first step is as long as the learning rate: a hundredth of 0.01.
    torch.testing.assert_close((parameters[name] - start[name]).abs(), torch.full((8,), 1e-4), rtol=1e-2, atol=0)


def frozen_kind(number: int, every: int) -> str:
    return ".router." if number // every % 2 == 0 else ".experts."


def alternating(config: RunConfig, every: int) -> Stepper:
    config = replace(config, optim=replace(config.optim, alternate=every))
    return Stepper(config, Transformer(config.model, torch.Generator().manual_seed(0)))


def snapshots(stepper: Stepper) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Weights and optimizer state before and after each of 8 steps, under one roof each."""

    def now() -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in stepper.weights.masters.items()}
        names = {id(p): name for name, p in stepper.weights.masters.items()}
        for part in stepper.optimizers.parts:
            for parameter, entries in part.state.items():
                found |= {f"{names[id(parameter)]} {key}": value.clone() for key, value in entries.items()}
        return found

    for number in range(8):
        before = now()
        stepper.step(ids(), number)
        yield before, now()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_in_turn_routers_and_experts_stand_still_to_the_last_bit(small_run: RunConfig, kind: str, every: int) -> None:
    config = replace(small_run, optim=replace(small_run.optim, kind=kind))
    for number, (before, after) in enumerate(snapshots(alternating(config, every))):
        still = {name for name in before if torch.equal(before[name], after[name])}
        assert still == {name for name in before if frozen_kind(number, every) in name}, number
        assert still or number == 0


def test_balancing_goes_on_while_routers_stand_still(small_run: RunConfig) -> None:
    stepper = alternating(small_run, 100)
    bias = stepper.model.layers[1].feed_forward.balance["bias"].bias()
    for number in range(3):
        before = bias.clone()
        stepper.step(ids(), number)
        assert not torch.equal(bias, before)


@pytest.mark.parametrize(("first", "part"), [(0, ".router."), (4, ".experts.")])
def test_a_frozen_part_is_as_if_it_asked_for_no_gradient(small_run: RunConfig, first: int, part: str) -> None:
    model = Transformer(small_run.model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    other, stepper = Stepper(small_run, model), alternating(small_run, 4)
    for number in range(first, first + 4):
        one, two = stepper.step(ids(), number), other.step(ids(), number)
        assert one.gradient_norm == two.gradient_norm
    theirs = dict(other.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in stepper.model.named_parameters())


class StopAt:
    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def stepped(self, row: dict) -> None:
        self.seen = row["step"]

    def stopping(self) -> bool:
        return self.seen == self.step


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_stopped_amid_a_frozen_phase_goes_on_as_if_it_had_not(
    small_run: RunConfig, tmp_path: Path, stop: int
) -> None:
    optim = replace(small_run.optim, alternate=2, router=RouterOptim(lr=0.02, warmup_steps=5))
    moe = replace(small_run.model.moe, expert_dropout=0.2)
    train = replace(small_run.train, steps=6)
    config = replace(small_run, optim=optim, train=train, model=small_model(moe=moe))
    corpus = prepare(config.data, config.model.vocab_size, tmp_path / "cache")
    whole = Run(config, corpus, tmp_path / "whole", resume=False)
    assert whole.train(StopAt(0))
    assert not Run(config, corpus, tmp_path / "cut", resume=False).train(StopAt(stop))
    resumed = Run(config, corpus, tmp_path / "cut", resume=True)
    assert resumed.progress.step == stop
    assert resumed.train(StopAt(0))
    ours, theirs = resumed.stepper.model.state_dict(), whole.stepper.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_dropout_draws_anew_in_each_step_and_the_same_when_a_step_is_done_again(small_run: RunConfig) -> None:
    config = replace(small_run, model=small_model(moe=replace(small_run.model.moe, expert_dropout=0.5)))
    stepper = Stepper(config, Transformer(config.model, torch.Generator().manual_seed(0)))

    def gradient(number: int) -> torch.Tensor:
        stepper.gradients(ids(), number=number)
        found = stepper.weights.masters["layers.1.feed_forward.experts.down"].grad
        assert found is not None
        stepper.weights.clear()
        return found

    assert torch.equal(gradient(3), gradient(3))
    assert not torch.equal(gradient(3), gradient(4))


@pytest.mark.parametrize(("key", "value"), [("router.lr", "-1"), ("router.warmup-steps", "-1"), ("alternate", "-2")])
def test_what_cannot_be_is_refused_by_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="must not be negative") as caught:
        update(RunConfig(), overrides([(f"optim.{key}", value)]))
    assert caught.value.key == f"optim.{key}".replace("-", "_")


def test_the_routers_settings_are_set_by_their_keys() -> None:
    config = update(RunConfig(), overrides([("optim.router.lr", "0.5"), ("optim.alternate", "7")]))
    assert (config.optim.router.lr, config.optim.router.warmup_steps, config.optim.alternate) == (0.5, 0, 7)
