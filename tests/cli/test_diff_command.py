"""`moekit diff`: what it prints of two folders, and its exit status."""

import json
import shutil
from pathlib import Path

import pytest
from cli_cases import Moekit, assert_refused, contents
from safetensors.torch import load_file, save_file

from moekit.checkpoint.convert import convert
from moekit.data.tokenizer import train_tokenizer


@pytest.fixture
def pair(trained: Path) -> Path:
    """The run `runs/a`, and `b`, which is the same in bfloat16."""
    convert(trained, Path("b"), "bfloat16")
    return trained


def test_a_folder_does_not_differ_from_itself(pair: Path, moekit: Moekit) -> None:
    said = moekit("diff", "runs/a", "runs/a", "--tokens", "words.txt", "--limit", "100", "--json")
    assert said.status == 0, said
    found = json.loads(said.out)
    assert found["identical"] is True
    assert found["configuration"] == []
    assert {tensor["state"] for tensor in found["tensors"]} == {"identical"}
    assert found["logits"] == {
        "positions": 100,
        "largest": 0.0,
        "mean": 0.0,
        "divergence": 0.0,
        "largest_divergence": 0.0,
        "agreement": 1.0,
    }
    assert moekit("diff", "runs/a", "runs/a").out.endswith("identical\n")


def test_its_rounding_differs_and_that_is_no_failure(pair: Path, moekit: Moekit) -> None:
    before = contents(pair)
    said = moekit("diff", "runs/a", "b", "--tokens", "words.txt", "--limit", "200", "--json")
    assert said.status == 0, said
    found = json.loads(said.out)
    assert found["identical"] is False
    logits = found["logits"]
    assert 0 < logits["divergence"] <= logits["largest_divergence"] < 0.01
    assert 0 < logits["mean"] < logits["largest"] < 0.1
    assert 0.9 < logits["agreement"] <= 1
    names = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert names["embedding.weight"]["dtypes"] == ["F32", "BF16"]
    assert names["embedding.weight"]["part"] == "embedding"
    shown = moekit("diff", "runs/a", "b", "--tokens", "words.txt", "--limit", "200")
    assert shown.status == 0
    assert "KL(A || B)" in shown.out and "routed experts" in shown.out and "not identical" in shown.out
    assert contents(pair) == before


def test_token_ids_may_be_given_instead_of_text(pair: Path, moekit: Moekit) -> None:
    Path("ids.txt").write_text("1, 2,3\n4 5\t299")
    found = json.loads(moekit("diff", "runs/a", "b", "--tokens", "ids.txt", "--json").out)
    assert found["logits"]["positions"] == 6
    limited = json.loads(moekit("diff", "runs/a", "b", "--tokens", "ids.txt", "--limit", "4", "--json").out)
    assert limited["logits"]["positions"] == 4


def test_other_configurations_and_tensors_are_named(pair: Path, moekit: Moekit) -> None:
    file = Path("b") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts_per_tok": 3}))
    said = moekit("diff", "runs/a", "b", "--json")
    assert json.loads(said.out)["configuration"] == [{"field": "moe.top_k", "a": "2", "b": "3"}]
    assert "moe.top_k" in moekit("diff", "runs/a", "b").out


def test_what_cannot_be_compared_is_bad_input(pair: Path, moekit: Moekit) -> None:
    Path("big.txt").write_text("1 2 300")
    Path("latin.txt").write_bytes(b"m\xfcde")
    Path("empty.txt").touch()
    for line, words in {
        "runs/a": ("B",),
        "runs/a nowhere": ("nowhere: no such folder",),
        "runs/a b --tokens nowhere.txt": ("nowhere.txt: no such file",),
        "runs/a b --tokens runs": ("runs: is a folder",),
        "runs/a b --tokens latin.txt": ("latin.txt", "UTF-8"),
        "runs/a b --tokens empty.txt": ("no tokens",),
        "runs/a b --tokens big.txt": ("token id 300",),
        "runs/a b --tokens words.txt --limit 0": ("--limit 0",),
        "runs/a b --dtype fp8": ("--dtype", "fp8"),
    }.items():
        assert_refused(moekit("diff", *line.split()), *words)


def test_tokenizers_must_agree_on_the_text(pair: Path, moekit: Moekit) -> None:
    (Path("b") / "tokenizer.json").write_text(train_tokenizer(["router weights " * 9], 290).to_str(), "utf-8")
    assert_refused(moekit("diff", "runs/a", "b", "--tokens", "words.txt"), "b: its tokenizer makes other ids")
    assert moekit("diff", "runs/a", "b").status == 0
    (Path("b") / "tokenizer.json").unlink()
    assert moekit("diff", "runs/a", "b", "--tokens", "words.txt", "--limit", "9").status == 0
    assert_refused(moekit("diff", "b", "runs/a", "--tokens", "words.txt"), "tokenizer.json: no such file")


def test_a_damaged_folder_is_bad_input(pair: Path, moekit: Moekit) -> None:
    shutil.copytree("b", "c")
    tensors = load_file("c/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, "c/model.safetensors")
    assert_refused(moekit("diff", "runs/a", "c"), "model.norm.weight is missing", "moekit inspect c")
