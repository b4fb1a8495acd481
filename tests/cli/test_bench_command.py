"""`moekit bench` measures what is asked for, and says which programs are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import Moekit, assert_refused

QUICK = ("bench", "layer-decode-int4", "--quick")


def test_json_holds_the_machine_and_one_row_per_work(moekit: Moekit) -> None:
    said = moekit("bench", "layer-decode", *QUICK[1:], "--peer", "transformers", "--json")
    assert said.status == 0
    found = json.loads(said.out)
    assert found.keys() == {"host", "rows", "missing", "quick"}
    assert [row["work"] for row in found["rows"]] == ["layer-decode", "layer-decode-int4"]
    assert found["rows"][0]["peer_name"].startswith("transformers ")
    assert found["rows"][1]["peer"] is None
    assert found["quick"] is True


def test_a_reader_gets_a_table(moekit: Moekit) -> None:
    said = moekit(*QUICK, "--peer", "none")
    assert said.status == 0
    assert "mean nothing" in said.out
    assert "layer-decode-int4: layer, forward, 4 bits" in said.out
    assert "transformers" not in said.out


def test_threads_are_those_of_every_program(moekit: Moekit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        said = moekit(*QUICK, "--peer", "none", "--threads", "2", "--json")
        assert os.environ["OMP_NUM_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)
    assert json.loads(said.out)["host"]["threads"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["layer-decod"], ["layer-decod", "layer-decode"]),
        (["--peer", "vllm"], ["--peer vllm", "transformers"]),
        (["--peer", "none", "--peer", "transformers"], ["--peer none", "alone"]),
        (["--threads", "0"], ["--threads 0"]),
        (["--quick", "--save", "out"], ["--save", "--quick"]),
        (["--save", "words.txt"], ["words.txt", "is a file"]),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: list[str], here: Path, moekit: Moekit) -> None:
    before = sorted(here.iterdir())
    assert_refused(moekit("bench", *arguments), *words)
    assert sorted(here.iterdir()) == before


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has all packages of this one but the peers."""
    for folder in filter(None, sys.path):
        for entry in Path(folder).glob("*") if Path(folder).name == "site-packages" else ():
            if not entry.name.lower().startswith(("transformers", "llama_cpp", "gguf")):
                (tmp_path / entry.name).symlink_to(entry)
    package = Path(__file__).parents[2] / "src"
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(package)])}


def without_peers(bare: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S: no site-packages but those of PYTHONPATH.
    command = [sys.executable, "-S", "-m", "moekit", *QUICK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=bare)


def test_peers_that_are_not_installed_are_said_to_be_missing(bare: dict[str, str]) -> None:
    done = without_peers(bare, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["missing"] == [
        {"peer": "transformers", "install": "pip install transformers"},
        {"peer": "llama.cpp", "install": "pip install llama-cpp-python gguf"},
    ]
    for missing in found["missing"]:
        assert f"{missing['peer']} is not installed, and left out: {missing['install']}" in done.stderr
    assert found["rows"][0]["moekit"] > 0


def test_a_peer_that_is_asked_for_must_be_there(bare: dict[str, str]) -> None:
    done = without_peers(bare, "--peer", "llama.cpp")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --peer llama.cpp: llama-cpp-python and gguf not installed\nhint: pip install llama-cpp-python gguf\n"
    )
