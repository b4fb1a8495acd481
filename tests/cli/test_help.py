"""Help is quick and complete."""

import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import Moekit

from moekit.cli.main import VERBS
from moekit.config.describe import describe
from moekit.config.presets.load import load_run, preset_names

# argparse ends the process itself after a verb's help.
LIST_MODULES = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
from moekit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def modules_of(*arguments: str) -> set[str]:
    """The modules that a process has loaded at the end of this command."""
    command = [sys.executable, "-c", LIST_MODULES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_overview_loads_nothing_heavy(arguments: list[str]) -> None:
    assert not {"torch", "numpy", "rich", "tokenizers"} & modules_of(*arguments)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_leaves_torch_out(verb: str) -> None:
    assert "torch" not in modules_of(verb, "--help")


def test_showing_a_configuration_leaves_torch_out() -> None:
    assert "torch" not in modules_of("train", "tiny", "--show-config")


@pytest.mark.parametrize("preset", preset_names())
def test_a_presets_help_lists_every_setting_with_its_value_and_text(
    preset: str, moekit: Moekit, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        moekit("train", "--out", "elsewhere", preset, "--help")
    assert ended.value.code == 0
    lines = capfd.readouterr().out.splitlines()
    for item in describe(load_run(preset)):
        place = lines.index(f"  --{item.key.replace('_', '-')} {item.value}")
        assert item.text
        assert lines[place + 1].strip() == item.text


@pytest.mark.parametrize("preset", preset_names())
def test_what_show_config_prints_is_a_file_of_the_same_run(preset: str, moekit: Moekit, tmp_path: Path) -> None:
    shown = moekit("train", preset, "--seed", "7", "--optim.lr", "0.125", "--show-config")
    assert (shown.status, shown.err) == (0, "")
    file = tmp_path / "shown.toml"
    file.write_text(shown.out, "utf-8")
    assert moekit("train", str(file), "--show-config") == shown
    assert load_run(str(file)).seed == 7
    assert load_run(str(file)).model == load_run(preset).model
