"""`moekit inspect`: what it prints, and its exit status."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_cases import Moekit, assert_refused, contents
from safetensors.torch import load_file, save_file

from moekit.cli.inspect import routing_words
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    held = load_file(folder / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / "model.safetensors")


def test_json_has_every_figure(trained: Path, moekit: Moekit) -> None:
    said = moekit("inspect", "runs/a", "--json")
    assert said.status == 0, said
    found = json.loads(said.out)
    assert (found["path"], found["model_type"], found["values"], found["problems"]) == (
        "runs/a",
        "deepseek_v3",
        "finite",
        [],
    )
    assert found["architecture"] | {"attention": 0, "rope": 0} == {
        "layers": 2,
        "dense_layers": 1,
        "moe_layers": 1,
        "width": 32,
        "dense_width": 48,
        "attention": 0,
        "rope": 0,
        "vocabulary": 300,
        "context": 128,
        "prediction_modules": 0,
        "tied_embeddings": False,
    }
    assert found["architecture"]["attention"]["kv_lora_rank"] == 16
    routing = found["routing"]
    assert (routing["score"], routing["top_k"], routing["n_routed"], routing["renormalise"]) == ("sigmoid", 2, 8, True)
    assert routing["selection_bias"] is True and routing["group_score"] is None
    parameters = found["parameters"]
    assert parameters["total"] == sum(part["total"] for part in parameters["by_part"].values())
    assert parameters["by_part"]["routed experts"] == {
        "total": 8 * 3 * 16 * 32,
        "active": 2 * 3 * 16 * 32,
        "bytes": 4 * 8 * 3 * 16 * 32,
    }
    tensors = load_file(trained / "model.safetensors")
    assert sum(kind["tensors"] for kind in found["dtypes"].values()) == len(tensors)
    assert found["dtypes"]["F32"]["bytes"] == sum(t.nbytes for t in tensors.values() if t.dtype == torch.float32)
    assert found["shards"] == [
        {
            "file": "model.safetensors",
            "bytes": (trained / "model.safetensors").stat().st_size,
            "tensors": len(tensors),
        }
    ]


def test_the_report_says_it_in_words_and_changes_nothing(trained: Path, moekit: Moekit) -> None:
    before = contents(trained)
    said = moekit("inspect", "runs/a")
    assert (said.status, said.err) == (0, "")
    for words in ("2 of width 32: 1 dense, 1 with experts", "the best 2 of 8 experts", "sigmoid", "routed experts"):
        assert words in said.out, words
    assert contents(trained) == before


def test_problems_are_reported_and_are_bad_input(trained: Path, moekit: Moekit) -> None:
    change(trained, **{"model.norm.weight": None, "stray": torch.tensor([torch.nan])})
    said = moekit("inspect", "runs/a")
    assert said.status == 2
    assert "missing: 1\n" in said.out and "unexpected: 1\n" in said.out and "not finite: 1\n" in said.out
    assert said.err.startswith("error: 3 problems, the first: runs/a: model.norm.weight is missing")
    assert "Traceback" not in said.err
    said = moekit("inspect", "runs/a", "--json")
    assert said.status == 2
    assert [problem["kind"] for problem in json.loads(said.out)["problems"]] == ["missing", "unexpected", "not finite"]


def test_many_problems_of_a_kind_are_cut_short_but_not_in_json(trained: Path, moekit: Moekit) -> None:
    change(trained, **{f"stray{number}": torch.ones(1) for number in range(25)})
    said = moekit("inspect", "runs/a")
    assert said.out.count("stray") == 10
    assert "unexpected: 25\n" in said.out and "... and 15 more" in said.out
    assert len(json.loads(moekit("inspect", "runs/a", "--json").out)["problems"]) == 25


@pytest.mark.parametrize("shown", [(), ("--json",)])
def test_without_a_description_nothing_is_printed(shown: tuple[str, ...], here: Path, moekit: Moekit) -> None:
    assert_refused(moekit("inspect", "nowhere", *shown), "nowhere: no such folder")
    assert_refused(moekit("inspect", ".", *shown), "no config.json in it")
    Path("config.json").write_text('{"model_type": "pong"}')
    assert_refused(moekit("inspect", ".", *shown), "config.json", "pong")
    assert_refused(moekit("inspect", *shown), "PATH")


def test_the_routing_contract_in_words() -> None:
    plain = MoEConfig(n_routed=64, top_k=6, n_shared=2, expert_width=1408)
    assert routing_words(plain) == (
        "the best 6 of 64 experts of width 1408; chosen by softmax; weights as scored; 2 shared (width 2816)"
    )
    rule = TopKRouting(order="top_k_then_score", renormalise=True, scale=2.5, n_groups=8, top_k_groups=4)
    grouped = replace(plain, routing=rule, n_shared=1, shared_gate=True)
    assert routing_words(grouped) == (
        "the best 6 of 64 experts of width 1408; from the best 4 of 8 groups (a group counts by its best expert); "
        "chosen by logit, then softmax; weights that sum to 1, times 2.5; 1 shared (width 1408, gated)"
    )
