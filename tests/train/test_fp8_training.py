"""Training with FP8 simulated: gradients straight through the roundings, exact masters, resuming without a trace."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moekit.cli.main import main
from moekit.config.run import RunConfig
from moekit.data.corpus import prepare
from moekit.model.fp8 import simulated_fp8, weight_roundings
from moekit.model.transformer import Transformer
from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from moekit.moe.routing import Routing
from moekit.tensors.fp8 import round_rows
from moekit.train.loop import Run, validate
from moekit.train.metrics import read_metrics
from moekit.train.step import Stepper
from oracle.compare import relative_error


@pytest.fixture(params=["float32", "bfloat16"])
def fp8_run(small_run: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    return replace(small_run, train=replace(small_run.train, fp8=True, dtype=request.param))


def ids() -> Tensor:
    return torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(3))


def new_stepper(config: RunConfig) -> Stepper:
    return Stepper(config, Transformer(config.model, torch.Generator().manual_seed(0)))


def straight_through(x: Tensor) -> Tensor:
    """The rounded value with the gradient of the identity, by autograd alone."""
    return x + (round_rows(x.detach()) - x).detach()


def one_by_one(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor) -> Tensor:
    rows = []
    for t, row in enumerate(straight_through(x)):
        y = torch.zeros_like(row)
        for weight, expert in zip(weights[t], chosen[t].tolist(), strict=True):
            gate, up = (gate_up[expert] @ row).chunk(2)
            y = y + weight * (down[expert] @ straight_through(F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def test_gradients_of_experts_in_fp8_equal_those_of_a_plain_straight_through_twin() -> None:
    source = torch.Generator().manual_seed(0)
    shapes = ((7, 140), (7, 2), (4, 2 * 130, 140), (4, 140, 130))
    inputs = [torch.randn(shape, generator=source, requires_grad=True) for shape in shapes]
    chosen = torch.rand(7, 4, generator=source).argsort(dim=-1)[:, :2]
    direction = torch.randn(7, 140, generator=source)
    x, weights, gate_up, down = inputs
    experts = Experts(4, 140, 130)
    experts.round_inner = round_rows
    scores = torch.rand(7, 4, generator=source)
    arguments = (round_rows(x), weights, dispatch(Routing(chosen, weights, scores, scores)))
    output = torch.func.functional_call(experts, {"gate_up": gate_up, "down": down}, arguments)
    twin = one_by_one(*inputs, chosen)
    assert relative_error(output, twin) < 1e-5
    actual, expected = (torch.autograd.grad(y, inputs, direction) for y in (output, twin))
    for name, one, other in zip(("x", "weights", "gate_up", "down"), actual, expected, strict=True):
        assert relative_error(one, other) < 1e-5, name


def test_the_model_computes_with_roundings_of_masters_that_are_not_rounded(fp8_run: RunConfig) -> None:
    stepper = new_stepper(fp8_run)
    first = Transformer(fp8_run.model, torch.Generator().manual_seed(0)).state_dict()
    assert all(torch.equal(master, first[name]) for name, master in stepper.weights.masters.items())
    for number in range(2):
        roundings, state = weight_roundings(stepper.model), stepper.weights.state(stepper.model)
        for name, working in stepper.weights.working.items():
            master = stepper.weights.masters[name].detach()
            held = roundings[name](master) if name in roundings else master
            assert torch.equal(working, held.to(working.dtype)), name
            assert name not in roundings or not torch.equal(held, master), name
            assert torch.equal(state[name], master), name
        stepper.step(ids(), number)
    assert not any(torch.equal(stepper.weights.masters[name].detach(), first[name]) for name in roundings)


def test_the_gradient_of_a_master_is_that_of_its_rounding(small_run: RunConfig) -> None:
    config = replace(small_run, train=replace(small_run.train, fp8=True))
    stepper = new_stepper(config)
    stepper.gradients(ids())
    plain = new_stepper(small_run)
    with simulated_fp8(plain.model):
        plain.gradients(ids())
    for name, master in stepper.weights.masters.items():
        expected = plain.weights.masters[name].grad
        assert (master.grad is None) == (expected is None)
        assert expected is None or torch.equal(master.grad, expected), name


def test_micro_batches_give_the_gradient_of_the_whole_batch(small_run: RunConfig) -> None:
    """A scale belongs to one token, so that other tokens in the batch cannot sway it."""
    found = []
    for micro_batch in (0, 2):
        config = replace(small_run, train=replace(small_run.train, fp8=True, micro_batch=micro_batch))
        stepper = new_stepper(config)
        stepper.gradients(ids())
        found.append({name: p.grad for name, p in stepper.weights.masters.items() if p.grad is not None})
    whole, parts = found
    flat = [torch.cat([gradients[name].flatten() for name in whole]) for gradients in (whole, parts)]
    assert relative_error(flat[1], flat[0]) < 1e-3


class Stopper:
    """Stops a run after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.reached = step, 0

    def stepped(self, row: dict[str, Any]) -> None:
        self.reached = row["step"]

    def stopping(self) -> bool:
        return self.reached == self.step


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(folder / "metrics.jsonl")]


def test_a_run_in_fp8_that_was_stopped_twice_equals_one_that_was_not(fp8_run: RunConfig, tmp_path: Path) -> None:
    corpus = prepare(fp8_run.data, fp8_run.model.vocab_size, tmp_path / "cache")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert Run(fp8_run, corpus, whole, resume=False).train(Stopper(0))
    for step in (3, 7):
        assert not Run(fp8_run, corpus, broken, resume=True).train(Stopper(step))
    assert Run(fp8_run, corpus, broken, resume=True).train(Stopper(0))
    assert timeless(whole) == timeless(broken)
    ours, theirs = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_in_fp8_validates_in_fp8_and_learns_as_without(small_run: RunConfig, tmp_path: Path) -> None:
    corpus = prepare(small_run.data, small_run.model.vocab_size, tmp_path / "cache")
    losses = {}
    for fp8 in (False, True):
        config = replace(small_run, train=replace(small_run.train, fp8=fp8))
        training = Run(config, corpus, tmp_path / f"fp8 {fp8}", resume=False)
        training.train(Stopper(0))
        losses[fp8] = [row["loss"] for row in timeless(training.folder)]
        model = Transformer(config.model)
        model.load_state_dict(training.stepper.weights.state(training.stepper.model))
        exact = validate(model, corpus, config.data.sequence_length)
        with simulated_fp8(model):
            rounded = validate(model, corpus, config.data.sequence_length)
        assert exact != rounded
        assert training.progress.validation == (rounded if fp8 else exact)
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.01)
    assert losses[True][-1] < 0.9 * losses[True][0]


def test_a_run_in_fp8_is_not_resumed_without_it(
    small_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = prepare(small_run.data, small_run.model.vocab_size, tmp_path / "cache")
    config = replace(small_run, train=replace(small_run.train, fp8=True))
    Run(config, corpus, tmp_path / "run", resume=False).train(Stopper(1))
    assert main(["train", "--out", str(tmp_path / "run"), "--resume", "--train.fp8", "false"]) == 2
    assert "`train.fp8`: false here, but true in" in capsys.readouterr().err
