"""Bad input is one line that names the culprit, status 2, and leaves every file as it was."""

from pathlib import Path

import pytest
from cli_cases import Moekit, assert_refused, contents

from moekit.data.tokenizer import train_tokenizer

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "trian": ("no command trian", "hint: did you mean `train`?"),
    "--bogus": ("no command --bogus", "hint: commands: train"),
    "train": ("name a preset or a TOML file", "tiny"),
    "train nopreset": ("nopreset", "tiny"),
    "train folder": ("folder",),
    "train run.toml more": ("more",),
    "train run.toml --sede 3": ("--sede", "did you mean `--seed`?"),
    "train run.toml --resum": ("--resum", "did you mean `--resume`?"),
    "train run.toml --seed": ("--seed",),
    "train run.toml --seed abc": ("`seed`", "abc"),
    "train run.toml --json=1": ("--json",),
    "train run.toml --model.moe.top-k": ("--model.moe.top-k needs a value",),
    "train run.toml --model.moe.top-kk 4": ("did you mean `top_k`?",),
    "train run.toml --model.moe 4": ("`model.moe`", "not a section"),
    "train run.toml --model.moe.top-k 9": ("`model.moe.top_k`", "n_routed = 8"),
    "train run.toml --model.moe.routing.n-groups 3": ("`model.moe.routing.n_groups`", "do not divide"),
    "train run.toml --model.attention.qk-rope-head-dim 7": ("`model.attention.qk_rope_head_dim`", "even"),
    "train run.toml --model.attention.kind mlla": ("`model.attention.kind`", "did you mean `mla`?"),
    "train run.toml --model.n-layers -1": ("`model.n_layers`",),
    "train run.toml --model.vocab-size 1e3": ("`model.vocab_size`", "whole number"),
    "train run.toml --model.vocab-size 10": ("`model.vocab_size`: 10", "258"),
    "train run.toml --train.steps 0": ("`train.steps`",),
    "train run.toml --train.steps -5": ("`train.steps`",),
    "train run.toml --train.micro-batch 3": ("`train.micro_batch`", "does not divide"),
    "train run.toml --train.dtype float8": ("`train.dtype`", "float32"),
    "train run.toml --optim.lr nan": ("`optim.lr`", "finite"),
    "train run.toml --data.sequence-length 200": ("`data.sequence_length`", "model.max_positions = 128"),
    "train run.toml --data.sources none": ("`data.sources`",),
    "train run.toml --data.tokenizer nowhere.json": ("nowhere.json",),
    "train run.toml --data.tokenizer words.txt": ("words.txt", "not a tokenizer"),
    "train run.toml --data.tokenizer large.json": ("large.json", "model.vocab_size"),
    "train run.toml --data a=nowhere.txt": ("nowhere.txt",),
    "train run.toml --data a=empty.txt": ("empty.txt", "empty file"),
    "train run.toml --data a=binary.txt": ("binary.txt", "binary file"),
    "train run.toml --data a=latin.txt": ("latin.txt", "not UTF-8"),
    "train run.toml --data a=short.txt": ("domain `a`", "data.sequence_length = 16"),
    "train run.toml --data a=rows.jsonl": ("rows.jsonl", "no column `text`", "body"),
    "train run.toml --data a=words.txt --data a=run.toml": ("domain `a`",),
    "train run.toml --data a=": ("--data a=",),
    "train run.toml --data =words.txt": ("`data.sources.0.domain`",),
    "train run.toml --data ../up=words.txt": ("`data.sources.0.domain`",),
    "train run.toml --device bogus": ("`device`: bogus", "devices here: cpu"),
    "train run.toml --device cuda:99": ("`device`: cuda:99", "devices here: cpu"),
    "train run.toml --device meta": ("`device`: meta",),
    "train run.toml --out words.txt": ("words.txt", "not a folder"),
    "train run.toml --out words.txt/deep/er": ("words.txt", "not a folder"),
    "train run.toml --out foreign": ("foreign holds config.json",),
    "train run.toml --out foreign --resume": ("foreign holds config.json",),
    "train --resume --out nowhere": ("nowhere holds no run.json",),
    "train broken.toml": ("broken.toml", "TOML"),
    "train latin.txt": ("latin.txt", "TOML"),
    "train unknown.toml": ("unknown.toml", "`model.moe.n_routd`", "did you mean `n_routed`?"),
    "train nopreset.toml": ("nopreset.toml", "nope", "tiny"),
    "train nopreset --help": ("nopreset",),
    "generate": ("PATH",),
    "generate nowhere --prompt x": ("nowhere", "no such folder"),
    "generate folder --prompt x": ("no config.json",),
    "generate words.txt --prompt x": ("words.txt",),
    "generate foreign --ids 1": ("config.json", "model_type"),
    "generate folder --ids a": ("--ids a",),
    "generate folder --prompt x --tempperature 1": ("did you mean `--temperature`?",),
    "generate folder --prompt x --temperature -1": ("temperature",),
    "generate folder --prompt x --dtype float8": ("--dtype", "float8"),
    "eval nowhere": ("nowhere", "no such folder"),
    "eval folder": ("no text",),
    "eval foreign --data words.txt": ("model_type",),
    "eval folder --data nowhere.txt": ("nowhere.txt",),
    "eval folder --data a=": ("--data a=",),
    "eval folder --data a=words.txt --data a=words.txt": ("`a`",),
    "eval folder --data words.txt --batch 0": ("--batch 0",),
    "report nowhere": ("nowhere", "no training run"),
    "report foreign": ("foreign", "no training run"),
}


@pytest.fixture
def odd_files(here: Path) -> Path:
    for name in ("folder", "foreign"):
        (here / name).mkdir()
    files = {
        "foreign/config.json": b'{"model_type": "gpt2"}',
        "empty.txt": b"",
        "binary.txt": b"a\0b",
        "latin.txt": "m\xfcde".encode("latin-1"),
        "short.txt": b"hi there",
        "rows.jsonl": b'{"body": "x"}',
        "broken.toml": b"a = [",
        "unknown.toml": b'preset = "tiny"\n[model.moe]\nn_routd = 3',
        "nopreset.toml": b'preset = "nope"',
        "large.json": train_tokenizer([f"word{n}" * 9 for n in range(400)], 400).to_str().encode(),
    }
    for name, content in files.items():
        (here / name).write_bytes(content)
    return here


@pytest.mark.parametrize(("line", "words"), ARGUMENTS.items(), ids=ARGUMENTS.keys())
def test_it_is_named_and_nothing_is_written(line: str, words: tuple[str, ...], odd_files: Path, moekit: Moekit) -> None:
    before = contents(odd_files)
    assert_refused(moekit(*line.split()), *words)
    assert contents(odd_files) == before


def test_only_debug_shows_a_traceback(here: Path, moekit: Moekit) -> None:
    assert "Traceback" not in moekit("train", "nopreset").err
    assert "Traceback" in moekit("train", "nopreset", "--debug").err


def test_an_error_is_one_line_whatever_it_quotes(here: Path, moekit: Moekit) -> None:
    assert_refused(moekit("train", "no\nsuch\npreset"))


def test_a_finished_run_is_refused_and_kept(trained: Path, moekit: Moekit) -> None:
    before = contents(trained)
    for line in (
        "train run.toml --out runs/a",
        "train run.toml --out runs/a --resume --optim.lr 0.5",
        "train run.toml --out runs/a --resume --data words.txt --data other=words.txt",
        "generate runs/a",
        "generate runs/a --prompt x --ids 1",
        "generate runs/a --ids 99999",
        "generate runs/a --prompt x --device cuda:99",
        "eval runs/a --device bogus",
        "eval runs/a --stride 100 --sequence-length 10",
        "report runs/a --out words.txt",
        "report runs/a --temperature nan",
        "report runs/a --device bogus",
    ):
        assert_refused(moekit(*line.split()))
    assert contents(trained) == before


def test_files_of_others_beside_a_run_stay(here: Path, moekit: Moekit) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.md").write_text("keep")
    assert moekit("train", "run.toml", "--out", "mine").status == 0
    assert (here / "mine" / "notes.md").read_text() == "keep"


def test_what_the_machine_refuses_is_a_failure_not_bad_input(here: Path, moekit: Moekit) -> None:
    # No process may make a folder there, not even the superuser's.
    said = moekit("train", "run.toml", "--out", "/proc/moekit/run")
    assert said.status == 1
    assert said.out == ""
    assert [line for line in said.err.splitlines() if line.startswith("error: /proc/moekit")]


def test_a_diverged_run_is_a_failure_in_one_line(here: Path, moekit: Moekit) -> None:
    said = moekit("train", "run.toml", "--out", "a", "--optim.lr", "1e30", "--optim.clip", "0", "--optim.kind", "adamw")
    assert said.status == 1
    assert said.err.splitlines()[-2].startswith("error: step ")
    assert "not finite" in said.err
