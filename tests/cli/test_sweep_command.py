"""`moekit sweep` trains every variant with every seed, goes on after any end, and compares."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_cases import Moekit, assert_refused, contents

LAB = """
title = "Two ways"
base = "run.toml"
seeds = [0, 5]

[variants.plain]
model.moe.balance = "none"

[variants.choice]
about = "one expert more"
model.moe.top_k = 3
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def lab(here: Path) -> Path:
    (here / "lab.toml").write_text(LAB, "utf-8")
    return here


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key != "tokens_per_s"}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def figures(folder: Path) -> Any:
    return timeless(json.loads((folder / "sweep.json").read_text("utf-8")))


def rows(folder: Path, name: str, seed: int) -> int:
    file = folder / "runs" / name / f"seed-{seed}" / "metrics.jsonl"
    return len(file.read_text("utf-8").splitlines()) if file.is_file() else 0


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "moekit.cli.main", "sweep", "lab.toml", *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end_at(
    process: "subprocess.Popen[str]", with_signal: signal.Signals, folder: Path, run: tuple[str, int, int]
) -> str:
    """Send the signal as soon as a run has so many steps; returns what the process said."""
    name, seed, steps = run
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if rows(folder, name, seed) >= steps:
            process.send_signal(with_signal)
            break
        time.sleep(0.001)
    out, said = process.communicate(timeout=120)
    assert out == "", said
    return said


def test_a_sweep_leaves_runs_a_table_figures_and_a_page(lab: Path, moekit: Moekit) -> None:
    said = moekit("sweep", "lab.toml", "--out", "out")
    assert said.status == 0, said.err
    assert re.search(r"Two ways.*plain .*choice .*page: out/sweep.html", said.out, flags=re.DOTALL)
    data = figures(lab / "out")
    assert [variant["name"] for variant in data["variants"]] == ["plain", "choice"]
    for variant in data["variants"]:
        losses = [run["loss"] for run in variant["runs"]]
        assert variant["figures"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        for run in variant["runs"]:
            stored = json.loads((lab / "out" / run["folder"] / "run.json").read_text("utf-8"))
            assert stored["seed"] == run["seed"]
    assert data["variants"][1]["sets"] == {"model.moe.top_k": "3"}
    page = (lab / "out" / "sweep.html").read_text("utf-8")
    assert "choice" in page and "one expert more" in page
    assert moekit("report", "out/runs/choice/seed-5").status == 0


def test_a_finished_sweep_prints_the_same_again_without_training(lab: Path, moekit: Moekit) -> None:
    first = moekit("sweep", "lab.toml", "--out", "out", "--json")
    assert first.status == 0, first.err
    runs = contents(lab / "out" / "runs")
    again = moekit("sweep", "lab.toml", "--out", "out", "--json")
    assert again.out == first.out and "run 1 of" not in again.err
    assert contents(lab / "out" / "runs") == runs
    assert json.loads(again.out) == json.loads((lab / "out" / "sweep.json").read_text("utf-8"))


def test_only_the_named_variants_are_trained_and_the_rest_can_follow(lab: Path, moekit: Moekit) -> None:
    said = moekit("sweep", "lab.toml", "--out", "out", "--only", "choice")
    assert said.status == 0, said.err
    assert not (lab / "out" / "runs" / "plain").exists()
    assert [variant["name"] for variant in figures(lab / "out")["variants"]] == ["choice"]
    assert moekit("sweep", "lab.toml", "--out", "out").status == 0
    assert moekit("sweep", "lab.toml", "--out", "whole").status == 0
    assert figures(lab / "out") == figures(lab / "whole")


def test_a_sweep_killed_three_times_finds_what_an_undisturbed_one_finds_and_repeats_no_run(
    lab: Path, moekit: Moekit
) -> None:
    assert moekit("sweep", "lab.toml", "--out", "whole").status == 0
    out = lab / "out"
    # In the first run, between two checkpoints; as the second run ends and is measured; in the third run.
    for run in (("plain", 0, 3), ("choice", 0, 4), ("plain", 5, 1)):
        process = start("--out", "out")
        end_at(process, signal.SIGKILL, out, run)
        assert process.returncode == -signal.SIGKILL
    finished = out / "runs" / "plain" / "seed-0"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert moekit("sweep", "lab.toml", "--out", "out").status == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert figures(out) == figures(lab / "whole")


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(
    with_signal: signal.Signals, lab: Path, moekit: Moekit
) -> None:
    process = start("--out", "out", "--only", "choice", "plain")
    said = end_at(process, with_signal, lab / "out", ("plain", 0, 1))
    assert process.returncode == 0, said
    assert "go on with: moekit sweep lab.toml --out out --only choice plain" in said
    done = rows(lab / "out", "plain", 0)
    assert done == 4 or (lab / "out/runs/plain/seed-0/checkpoints" / f"step-{done:08d}").is_dir()
    again = moekit("sweep", "lab.toml", "--out", "out")
    assert again.status == 0, again.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("top_k = 3", "top_k = 9", "error: lab.toml: `variants.choice.model.moe.top_k`: 9 experts per token"),
        ("about =", "data.sequence_length = 300\nabout =", "variants.choice.data.sequence_length"),
        ("top_k = 3", "rooting = 3", "unknown key"),
        ('"run.toml"', '"no.toml"', "no.toml"),
        ("seeds = [0, 5]", "seeds = 1", "`seeds`"),
    ],
)
def test_a_lab_that_cannot_be_is_refused_before_anything_is_written(
    old: str, new: str, message: str, lab: Path, moekit: Moekit
) -> None:
    (lab / "lab.toml").write_text(LAB.replace(old, new), "utf-8")
    assert_refused(moekit("sweep", "lab.toml", "--out", "out"), message)
    assert not (lab / "out").exists()


def test_sequences_longer_than_the_model_can_read_are_refused(lab: Path, moekit: Moekit) -> None:
    (lab / "lab.toml").write_text(LAB + "model.max_positions = 8\n", "utf-8")
    said = moekit("sweep", "lab.toml", "--out", "out")
    assert_refused(said, "`variants.choice.data.sequence_length`: 16 exceeds model.max_positions = 8")


@pytest.mark.parametrize("arguments", [("none.toml",), ("words.txt",), ("lab.toml", "--only", "choise"), (".",)])
def test_other_bad_input_is_one_line(arguments: tuple[str, ...], lab: Path, moekit: Moekit) -> None:
    assert_refused(moekit("sweep", *arguments, "--out", "out"), arguments[-1])
    assert not (lab / "out").exists()


def test_a_run_made_with_other_settings_is_named(lab: Path, moekit: Moekit) -> None:
    assert moekit("sweep", "lab.toml", "--out", "out", "--only", "choice").status == 0
    (lab / "lab.toml").write_text(LAB.replace("top_k = 3", "top_k = 4"), "utf-8")
    before = contents(lab / "out")
    said = moekit("sweep", "lab.toml", "--out", "out")
    assert_refused(said, "out/runs/choice/seed-0: `model.moe.top_k` was 3 in that run, and is 4 in the lab")
    assert contents(lab / "out") == before


def test_other_text_under_the_same_name_is_refused(lab: Path, moekit: Moekit) -> None:
    assert moekit("sweep", "lab.toml", "--out", "out", "--only", "plain").status == 0
    text = (lab / "words.txt").read_text("utf-8")
    (lab / "words.txt").write_text(text.replace("expert", "adept"), "utf-8")
    assert_refused(moekit("sweep", "lab.toml", "--out", "out"), "out/runs/plain/seed-0: that run read other text")
