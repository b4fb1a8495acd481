"""Results on stdout, remarks on stderr, one JSON object where asked; whatever the folder, the name and the pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import Moekit, words

COMMAND = [sys.executable, "-m", "moekit"]


def test_json_is_the_only_thing_on_stdout(here: Path, moekit: Moekit) -> None:
    trained = moekit("train", "run.toml", "--out", "a", "--json")
    assert json.loads(trained.out)["step"] == 4
    told = moekit("generate", "a", "--ids", "1,2,3", "--max-new-tokens", "4", "--temperature", "0", "--json")
    found = json.loads(told.out)
    assert found["ids"][0][:3] == [1, 2, 3]
    assert {"text", "prefill_tokens_per_s", "decode_tokens_per_s"} <= found.keys()
    assert json.loads(moekit("eval", "a", "--json").out)["data"][0]["name"] == "words"
    assert json.loads(moekit("report", "a", "--json").out)
    assert (here / "a" / "report.html").is_file()


def test_tables_are_plain_text_without_a_terminal(
    trained: Path, moekit: Moekit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    said = moekit("eval", "runs/a")
    assert said.status == 0
    assert "\x1b" not in said.out + said.err
    assert "words" in said.out


def test_names_may_hold_spaces_and_any_letters(here: Path, moekit: Moekit) -> None:
    (here / "ein Tëxt 文.txt").write_text(words(1), "utf-8")
    out = here / "läufe und mehr" / "走 1"
    said = moekit("train", "run.toml", "--data", "wörter 1=ein Tëxt 文.txt", "--out", str(out), "--json")
    assert said.status == 0, said.err
    assert json.loads(said.out)["validation"].keys() == {"wörter 1"}
    assert moekit("eval", str(out)).status == 0
    assert moekit("generate", str(out), "--prompt", "é 文", "--max-new-tokens", "3").status == 0
    assert moekit("report", str(out), "--out", str(here / "bericht ü")).status == 0


def test_a_run_is_opened_from_any_folder(trained: Path, moekit: Moekit, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained.parent / "deep").mkdir()
    monkeypatch.chdir(trained.parent / "deep")
    assert moekit("generate", "../a", "--prompt", "the", "--max-new-tokens", "3").status == 0
    assert moekit("eval", "../a").status == 0


@pytest.mark.parametrize("module", ["moekit", "moekit.cli.main"])
def test_python_m_is_the_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command trian\nhint: did you mean `train`?\n"


def test_a_reader_that_leaves_is_no_error(here: Path) -> None:
    for line in ("train tiny --help", "train tiny --show-config", "--help"):
        process = subprocess.Popen([*COMMAND, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
        process.stderr.close()


def test_a_stdout_that_cannot_hold_our_letters_is_no_traceback(here: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, "train", "文"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no preset and no file is called")
