"""`moekit quantize` on a trained run: what it says, what it writes, what every other command makes of that."""

import json
import shutil
from pathlib import Path

import pytest
from cli_cases import Moekit, assert_refused, contents

from moekit.checkpoint.load import load
from moekit.plan.sources import blueprint_from


@pytest.fixture
def source(here: Path, moekit: Moekit) -> Path:
    """A finished run whose rows are whole groups of 32."""
    sizes = ("--model.moe.expert-width", "32", "--model.attention.kv-lora-rank", "32", "--model.dense-width", "64")
    assert moekit("train", "run.toml", "--out", "runs/a", *sizes).status == 0
    return here / "runs" / "a"


@pytest.fixture
def quantised(source: Path, moekit: Moekit) -> Path:
    assert moekit("quantize", str(source), "there", "--bits", "4", "--group", "32", "--no-loss").status == 0
    return Path("there")


def test_it_says_bytes_and_losses_before_and_after(source: Path, moekit: Moekit) -> None:
    said = moekit("quantize", str(source), "--bits", "8", "--group", "32", "--json")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert found["path"] == str(source) + "-8bit"
    stored = sum(tensor.nbytes for tensor in load(found["path"]).state_dict().values())
    assert sum(part["after"] for part in found["parts"]) == stored
    assert sum(part["before"] for part in found["parts"]) == sum(t.nbytes for t in load(source).state_dict().values())
    (text,) = found["data"]
    assert text["name"] == "words"
    assert abs(text["difference"]) < 0.05
    assert text["difference"] == text["after"]["loss"] - text["before"]["loss"]
    before = json.loads(moekit("eval", str(source), "--json").out)["data"][0]
    assert text["before"]["loss"] == before["loss"]
    assert text["before"]["bits_per_byte"] == before["bits_per_byte"]
    data = str(source / "validation" / "words.txt")
    length = "--sequence-length", "16"
    after = json.loads(moekit("eval", found["path"], "--data", data, *length, "--json").out)["data"][0]
    assert text["after"]["loss"] == after["loss"]


def test_eval_says_in_which_windows_since_a_run_and_what_was_made_of_it_differ_there(
    source: Path, quantised: Path, moekit: Moekit
) -> None:
    data = "--data", str(source / "validation" / "words.txt")
    for folder in (source, quantised):
        length = json.loads(moekit("eval", str(folder), *data, "--json").out)["sequence_length"]
        assert f"in windows of {length} tokens" in " ".join(moekit("eval", str(folder), *data).out.split())


def test_it_prints_parts_texts_and_what_was_kept(source: Path, moekit: Moekit) -> None:
    said = moekit("quantize", str(source), "other", "--bits", "4", "--group", "64", "--no-loss")
    assert said.status == 0, said.err
    assert "kept, since the group does not divide their rows: layers.0.attention.q.weight" in said.out
    assert "perplexity" not in said.out
    said = moekit("quantize", str(source), "there", "--bits", "4", "--group", "32", "--keep", "head", "shared experts")
    assert said.status == 0, said.err
    for words in ("routed experts", "bits per byte", "perplexity", "words", "there: "):
        assert words in said.out
    rows = {line.split("│")[1].strip(): line.split("│") for line in said.out.splitlines() if "│" in line}
    assert float(rows["head"][-2]) == 32
    assert float(rows["routed experts"][-2]) == 5


@pytest.mark.parametrize("missing", ["tokenizer.json", "validation"])
def test_without_text_or_tokenizer_there_is_no_loss_and_a_word(missing: str, source: Path, moekit: Moekit) -> None:
    gone = source / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    said = moekit("quantize", str(source), "there", "--bits", "4", "--group", "32", "--json")
    assert said.status == 0
    assert "note: no loss before and after" in said.err
    assert json.loads(said.out)["data"] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "3"), "--bits"),
        (("--bits", "4", "--group", "48"), "--group"),
        ((), "--bits"),
        (("--bits", "4", "--keep", "nothing"), "--keep nothing"),
        (("--bits", "4", "--data", "missing.txt"), "missing.txt"),
        (("--bits", "4", "--batch", "0"), "--batch 0"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(
    options: tuple[str, ...], words: str, source: Path, moekit: Moekit
) -> None:
    before = contents(source.parent)
    assert_refused(moekit("quantize", str(source), *options), words)
    assert contents(source.parent) == before


def test_a_folder_that_exists_or_is_quantised_is_refused(source: Path, quantised: Path, moekit: Moekit) -> None:
    assert_refused(moekit("quantize", str(source), "there", "--bits", "4", "--group", "32", "--no-loss"), "exists")
    assert_refused(moekit("quantize", "there", "twice", "--bits", "8", "--group", "32"), "quantised already", "convert")
    assert_refused(moekit("eval", "there", "--fp8", "--data", "words.txt"), "FP8 cannot be simulated")


def test_inspect_tells_bits_and_bytes_of_the_parts(quantised: Path, moekit: Moekit) -> None:
    said = moekit("inspect", "there")
    assert said.status == 0
    assert "int4/32" in said.out
    found = json.loads(moekit("inspect", "there", "--json").out)
    stored = sum(tensor.nbytes for tensor in load("there").state_dict().values())
    assert sum(part["bytes"] for part in found["parameters"]["by_part"].values()) == stored
    assert found["parameters"]["total"] == load("there").size().stored
    assert found["values"] == "finite"


def test_plan_counts_what_is_stored(source: Path, quantised: Path, moekit: Moekit) -> None:
    assert moekit("convert", str(source), "half", "--dtype", "bfloat16").status == 0
    for folder, kept in (("a", ()), ("b", ("--keep", "attention")), ("c", ("--keep", "head", "shared experts"))):
        options = ("--bits", "4", "--group", "32", "--no-loss", *kept)
        assert moekit("quantize", "half", folder, *options).status == 0
        stored = sum(tensor.nbytes for tensor in load(folder).state_dict().values())
        found = json.loads(moekit("plan", folder, "--json").out)
        assert found["memory"]["weights"]["total"] == stored
        assert found["parameters"]["stored"]["total"] == load(folder).size().stored
        assert blueprint_from(folder).quantisation == "int4/32"


def test_other_commands_take_it(source: Path, quantised: Path, moekit: Moekit) -> None:
    said = moekit("generate", "there", "--prompt", "the expert", "--max-new-tokens", "3", "--json")
    assert said.status == 0, said.err
    assert moekit("convert", "there", "restored", "--dtype", "float32").status == 0
    assert moekit("inspect", "restored").status == 0
    said = moekit("diff", "there", "restored", "--tokens", str(source / "validation" / "words.txt"), "--limit", "32")
    assert said.status == 0, said.err
    assert "same values" in said.out
    said = moekit("convert", "there", "there.gguf", "--to", "gguf", "--dtype", "bfloat16")
    assert said.status == 0 or said.err.startswith("error: ")


def test_a_damaged_folder_is_one_line(quantised: Path, moekit: Moekit) -> None:
    file = quantised / "config.json"
    data = json.loads(file.read_text())
    for key, value in (("bits", 3), ("group_size", 48)):
        changed = data["quantization_config"] | {key: value}
        file.write_text(json.dumps(data | {"quantization_config": changed}))
        for command in (("inspect",), ("eval", "--data", "words.txt"), ("generate", "--ids", "1"), ("plan",)):
            assert_refused(moekit(command[0], "there", *command[1:]), f"quantization_config.{key}")
