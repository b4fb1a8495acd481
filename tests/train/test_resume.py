import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moekit.config.codec import to_toml
from moekit.config.run import RunConfig
from moekit.train.metrics import read_metrics


def command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "moekit.cli.main", "train", str(config), "--out", str(out), *more]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "MOEKIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run_file(small_run: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(small_run), "utf-8")
    return path


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, check=False, env=environment, capture_output=True, text=True, timeout=240)


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    assert timeless(a) == timeless(b)
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def kill_at(process: subprocess.Popen[str], metrics: Path, step: int, with_signal: signal.Signals) -> None:
    """Send the signal as soon as the row of `step` is there."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_metrics(metrics)) >= step:
            process.send_signal(with_signal)
            break
        time.sleep(0.001)


def test_a_run_killed_twice_and_resumed_equals_one_never_killed(
    run_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(command(run_file, whole), environment).returncode == 0
    for step in (2, 7):
        process = subprocess.Popen(
            command(run_file, broken, "--resume"), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        kill_at(process, broken / "metrics.jsonl", step, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    result = run(command(run_file, broken, "--resume"), environment)
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, broken)


def test_a_stopped_run_saves_and_says_how_to_go_on(run_file: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(command(run_file, whole), environment).returncode == 0
    process = subprocess.Popen(
        command(run_file, stopped), env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    kill_at(process, stopped / "metrics.jsonl", 3, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 0
    assert f"moekit train --out {stopped} --resume" in said
    result = run([*command(run_file, stopped)[:4], "--out", str(stopped), "--resume"], environment)
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, stopped)


def test_a_run_is_not_overwritten_nor_resumed_as_another(
    run_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    assert run(command(run_file, out), environment).returncode == 0
    before = (out / "model.safetensors").read_bytes()
    again = run(command(run_file, out), environment)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    other = run(command(run_file, out, "--resume", "--optim.lr", "0.5"), environment)
    assert other.returncode == 2
    assert "`optim.lr`: 0.5 here, but 0.01" in other.stderr
    assert (out / "model.safetensors").read_bytes() == before


def test_a_full_disk_is_an_error_and_the_last_checkpoint_stays_whole(
    run_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    short = [*command(run_file, out), "--train.steps", "4"]
    assert run(short, environment).returncode == 0
    weights = load_file(out / "model.safetensors")
    # The kernel refuses to let any file grow beyond 20 kB, as a full disk would.
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command(run_file, out, "--resume")]
    result = run(limited, environment)
    assert result.returncode == 1
    said = result.stderr.splitlines()[-2]
    assert said.startswith(f"error: {out}/checkpoints/step-")
    assert "the last one, of step 4, is whole" in said
    assert "Traceback" not in result.stderr
    kept = load_file(out / "model.safetensors")
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    assert [path.name for path in (out / "checkpoints").iterdir() if not path.name.startswith(".")] == ["step-00000004"]
    assert run(command(run_file, out, "--resume"), environment).returncode == 0


def test_the_newest_checkpoints_and_the_best_are_kept(
    run_file: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    result = run(command(run_file, out, "--train.checkpoint-every", "2", "--train.keep", "2", "--json"), environment)
    assert result.returncode == 0
    assert set(json.loads(result.stdout)["validation"]) == {"words"}
    rows = [(row["validation"]["words"]["bits_per_byte"], row["step"]) for row in timeless(out) if "validation" in row]
    kept = {int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()}
    assert kept == {10, 12, min(rows)[1]}
