"""Models with capacities train, say what they dropped, and are saved with what their capacities learnt."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import small_model

import moekit
from moekit.config.capacity import Capacity, DeviceCapacity, DynamicCapacity, ExpertCapacity
from moekit.config.codec import to_toml
from moekit.config.run import RunConfig
from moekit.model.transformer import Transformer
from moekit.train.metrics import read_metrics
from moekit.train.step import Stepper

CAPACITIES = (
    ExpertCapacity(factor=0.5, drop="random"),
    ExpertCapacity(factor=0.8, scope="sequence", drop="batch_priority", dropped="next_best"),
    DynamicCapacity(factor=1.0, low=0.9, high=1.1, drop="probability", dropped="residual"),
    DeviceCapacity(factor=0.5, n_devices=4, protected=0.25),
)


def with_capacity(run: RunConfig, capacity: Capacity) -> RunConfig:
    return replace(run, model=small_model(moe=replace(run.model.moe, capacity=capacity)))


def two_steps(run: RunConfig) -> Stepper:
    stepper = Stepper(run, Transformer(run.model, torch.Generator().manual_seed(0)))
    for number in range(2):
        ids = torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(number))
        stepper.step(ids, number)
    return stepper


@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda capacity: capacity.kind)
def test_a_model_with_capacities_is_saved_and_loaded_with_their_state(
    small_run: RunConfig, capacity: Capacity, tmp_path: Path
) -> None:
    trained = two_steps(with_capacity(small_run, capacity)).model
    moekit.save(trained, tmp_path / "model")
    loaded = moekit.load(tmp_path / "model", dtype=torch.float32)
    assert loaded.config.moe.capacity == capacity
    ours, theirs = trained.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(trained.eval()(ids).logits, loaded.eval()(ids).logits)


@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda capacity: capacity.kind)
def test_two_runs_of_the_same_seed_drop_the_same(small_run: RunConfig, capacity: Capacity) -> None:
    first, second = (two_steps(with_capacity(small_run, capacity)).model.state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_dynamic_factors_move_in_training_for_each_layer_by_itself(small_run: RunConfig) -> None:
    model = two_steps(with_capacity(small_run, CAPACITIES[2])).model
    factors = [value for key, value in model.state_dict().items() if key.endswith("router.capacity.factors")]
    assert len(factors) == 3
    assert all((one != 1.0).any() for one in factors)
    assert not torch.equal(factors[0], factors[1])


@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda capacity: capacity.kind)
def test_a_run_reports_the_share_it_dropped(small_run: RunConfig, capacity: Capacity, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(with_capacity(small_run, capacity)), "utf-8")
    command = [sys.executable, "-m", "moekit.cli.main", "train", str(tmp_path / "run.toml"), "--train.steps", "3"]
    environment = {**os.environ, "MOEKIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [layer["drop_rate"] for row in rows for layer in row["layers"]]
    assert len(rates) == 9
    assert all(0 < rate < 1 for rate in rates)
