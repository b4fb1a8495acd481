"""`moekit eval`: what it prints, and what it says to input that cannot be."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from moekit.checkpoint.save import save_model
from moekit.cli import eval as command
from moekit.config.errors import InputError
from moekit.data.tokenizer import save_tokenizer
from moekit.evaluate.baseline import compressed_bits_per_byte
from moekit.evaluate.text import evaluate_tokens
from moekit.model.transformer import Transformer

TEXT = "the lazy dog jumps over 天地\n" * 12


@pytest.fixture
def folder(tmp_path: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder, entered, with two texts in it."""
    folder = tmp_path / "model"
    save_model(model.state_dict(), model.config, folder, tokenizer)
    monkeypatch.chdir(folder)
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    Path("b=c.txt").write_text("brown fox\r\n", encoding="utf-8", newline="")
    return folder


def run(*options: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.configure(parser)
    return command.run(parser.parse_args([".", *options]))


def test_json_has_every_figure_of_each_text(
    folder: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--data", "dogs=a.txt", "--data", "b=c.txt", "--sequence-length", "16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["sequence_length"], found["stride"]) == (".", 16, 8)
    dogs, foxes = found["data"]
    ids = np.array(tokenizer.encode(TEXT).ids)
    expected = evaluate_tokens(model, ids, len(TEXT.encode()), 0, 16, 8)
    assert dogs == {
        "name": "dogs",
        "file": "a.txt",
        **expected._asdict(),
        "interval": list(expected.interval or ()),
        **compressed_bits_per_byte(TEXT),
    }
    assert (foxes["name"], foxes["bytes"], foxes["interval"]) == ("b=c", 11, None)


def test_a_table_shows_the_same_and_notices_go_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--data", "a.txt", "--sequence-length", "16", "--json")
    (row,) = json.loads(capsys.readouterr().out)["data"]
    run("--data", "a.txt", "--sequence-length", "16")
    out, err = capsys.readouterr()
    for figure in (row["bits_per_byte"], *row["interval"], row["gzip"], row["xz"]):
        assert f"{figure:.3f}" in out
    assert "evaluating a" in err and "evaluating" not in out


def test_windows_are_as_long_as_the_model_is_made_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--data", "a.txt", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["sequence_length"], found["stride"]) == (64, 32)


def test_windows_of_a_run_are_as_long_as_in_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.json").write_text(json.dumps({"data": {"sequence_length": 24}}))
    run("--data", "a.txt", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["sequence_length"], found["stride"]) == (24, 12)


def test_a_folder_that_is_not_there_is_an_error(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    with pytest.raises(InputError, match="missing: no such folder"):
        command.run(parser.parse_args(["missing", "--data", "a.txt"]))


def test_a_tokenizer_that_loses_text_is_noted(
    folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = Tokenizer.from_str(tokenizer.to_str())
    lossy.normalizer = normalizers.Strip()
    save_tokenizer(lossy, folder)
    run("--data", "a.txt", "--json")
    assert "does not keep all of a.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no text to evaluate"),
        (["--data", "missing.txt"], "missing.txt: no such file"),
        (["--data", "x=missing.txt"], "missing.txt: no such file"),
        (["--data", "."], ".: is a folder"),
        (["--data", "bad.txt"], "bad.txt: is not UTF-8 text (byte 3)"),
        (["--data", "empty.txt"], "empty.txt: is empty"),
        (["--data", "a.txt", "--data", "a=b=c.txt"], "two texts are called `a`"),
        (["--data", "a.txt", "--stride", "0"], "--stride 0: must be above 0"),
        (["--data", "a.txt", "--sequence-length", "-4"], "--sequence-length -4: must be above 0"),
        (["--data", "a.txt", "--sequence-length", "4", "--stride", "5"], "`stride`: 5 exceeds"),
    ],
)
def test_input_that_cannot_be_is_an_error(folder: Path, options: list[str], message: str) -> None:
    Path("bad.txt").write_bytes(b"abc\xff")
    Path("empty.txt").touch()
    with pytest.raises(InputError) as error:
        run(*options)
    assert message in str(error.value)


def test_help_explains_every_option() -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert all(action.help for action in parser._actions)
    assert "--stride" in parser.format_help()
