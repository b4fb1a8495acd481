"""The README's commands and its Python run, in order, on a corpus and a number of steps that a test can afford."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
QUICK = "--train.steps 2 --train.batch 2 --train.validate-every 2 --data.valid-bytes 4000"
SHORTER = {"train": QUICK, "sweep": f"{QUICK} --only none switch", "bench": "--quick --peer transformers"}


def commands() -> list[list[str]]:
    lines = re.findall(r"^    (moekit .*?)(?:\s{2,}#.*)?$", README, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all commands of the README were run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "README.md").write_text(README * 20, "utf-8")
    (folder / "labs").symlink_to(ROOT / "labs")
    environment = {**os.environ, "MOEKIT_CACHE": str(folder / "cache")}
    for command in commands():
        quick = SHORTER.get(command[1], "").split()
        arguments = [sys.executable, "-m", "moekit.cli.main", *command[1:], *quick]
        result = subprocess.run(
            arguments, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
        )
        assert result.returncode == 0, (command, result.stderr)
    return folder


def test_the_readme_shows_every_command() -> None:
    assert {command[1] for command in commands()} == set(VERBS)


def test_the_commands_leave_a_model_and_a_report(folder: Path) -> None:
    assert (folder / "runs/a/model.safetensors").is_file()
    assert "<html" in (folder / "runs/a/report.html").read_text("utf-8")


def test_the_python_runs(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    check = "assert y.shape == (2, 128, 512) and out.logits.shape[:2] == (1, 3) and ids.shape == (1, 35)"
    result = subprocess.run(
        [sys.executable, "-c", code + check], check=False, cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/traps.md", "docs/rules.md", "docs/speed.md"]
)
def test_every_link_and_file_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:moe|train|config|model|data|checkpoint|kernels)/[\w/]+\.py)`", text):
        assert (ROOT / "src/moekit" / name).is_file(), name


@pytest.mark.parametrize("page", ["docs/log.md", "docs/rules.md"])
def test_every_training_command_of_a_page_names_settings_that_exist(page: str) -> None:
    commands = re.findall(r"^    moekit (train .*)$", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE)
    for command in commands:
        assert main([*shlex.split(command), "--show-config"]) == 0, command
