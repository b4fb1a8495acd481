"""`moekit generate`: what it prints, and what it says to input that cannot be."""

import argparse
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moekit.checkpoint.save import save_model
from moekit.cli import generate as command
from moekit.config.errors import InputError
from moekit.generation.sampling import SamplingConfig
from moekit.generation.text import Stop, complete, encode_prompt
from moekit.model.transformer import Transformer

END = Stop(ids=(0,))
GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]


@pytest.fixture
def folder(tmp_path: Path, model: Transformer) -> Path:
    """A model folder without a tokenizer."""
    save_model(model.state_dict(), model.config, tmp_path / "model", None)
    return tmp_path / "model"


@pytest.fixture
def text_folder(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    """A model folder with a tokenizer."""
    save_model(model.state_dict(), model.config, tmp_path / "model", tokenizer)
    return tmp_path / "model"


def run(folder: Path, *options: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.configure(parser)
    return command.run(parser.parse_args([str(folder), *options]))


def continuation(model: Transformer, tokenizer: Tokenizer, prompt: str, stop: Stop = END) -> str:
    ids = [encode_prompt(tokenizer, prompt)]
    return complete(model, tokenizer, ids, 8, SamplingConfig(temperature=0.0), stop=stop).rows[0].text or ""


def test_ids_as_json_work_without_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--ids", "1,2,3", "--json", *GREEDY) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert list(found) == ["ids", "text", "prefill_tokens_per_s", "decode_tokens_per_s"]
    assert found["ids"][0][:3] == [1, 2, 3] and found["text"] == [None] and err == ""
    assert len(found["ids"][0]) == 11 and found["decode_tokens_per_s"] > 0


def test_ids_without_json_or_tokenizer_print_ids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--ids", "1,2,3", *GREEDY)
    ids = [int(part) for part in capsys.readouterr().out.split(",")]
    assert ids[:3] == [1, 2, 3] and len(ids) == 11


def test_one_prompt_prints_the_prompt_and_what_follows_and_its_speed_apart(
    text_folder: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(text_folder, "--prompt", "the fox", *GREEDY) == 0
    out, err = capsys.readouterr()
    assert out == "the fox" + continuation(model, tokenizer, "the fox") + "\n"
    assert "prefill" in err and "decode" in err and "tokens/s" in err


def test_several_prompts_print_each_completed_text(
    text_folder: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(text_folder, "--prompt", "the fox", "--prompt", "dog", *GREEDY)
    whole = [prompt + continuation(model, tokenizer, prompt) for prompt in ("the fox", "dog")]
    assert capsys.readouterr().out == "\n\n".join(whole) + "\n"


def test_an_empty_prompt_begins_a_text(text_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(text_folder, "--prompt", "", "--json", *GREEDY)
    assert json.loads(capsys.readouterr().out)["ids"][0][0] == 0


def test_a_stop_string_reaches_the_text(
    text_folder: Path, model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = continuation(model, tokenizer, "dog")[2:4]
    run(text_folder, "--prompt", "dog", "--stop", stop, "--json", *GREEDY)
    (text,) = json.loads(capsys.readouterr().out)["text"]
    assert text == continuation(model, tokenizer, "dog").split(stop)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --prompt or --ids"),
        (["--prompt", "a", "--ids", "1"], "give either --prompt or --ids"),
        (["--ids", "1,x"], "--ids 1,x: not a list of whole numbers"),
        (["--ids", ""], "not a list of whole numbers"),
        (["--ids=-1,2"], "-1 is negative"),
        (["--ids", "1.5"], "not a list of whole numbers"),
        (["--ids", "5,300"], "token id 300 is outside the model's vocabulary"),
        (["--ids", ",".join("1" * 129)], "the prompt has 129 tokens, but the model is made for 128"),
        (["--ids", "1", "--temperature", "-1"], "`temperature`"),
        (["--ids", "1", "--top-p", "2"], "`top_p`"),
        (["--ids", "1", "--max-new-tokens", "-1"], "--max-new-tokens -1: must not be negative"),
        (["--prompt", "a"], "tokenizer.json: no such file"),
        (["--ids", "1", "--stop", "a"], "tokenizer.json: no such file"),
    ],
)
def test_input_that_cannot_be_is_an_error(folder: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        run(folder, *options)
    assert message in str(error.value)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: no such folder"):
        run(tmp_path / "missing", "--prompt", "a")


def test_a_text_that_outgrows_the_model_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--ids", ",".join("1" * 127), "--json", "--max-new-tokens", "2")
    assert "note: text beyond 128 tokens" in capsys.readouterr().err


def test_help_explains_every_option() -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    assert all(action.help for action in parser._actions)
    assert "--repetition-penalty" in parser.format_help()
