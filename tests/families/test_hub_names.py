"""The names and shapes of our tensors on the hub are those of the released models."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from moekit.checkpoint.pieces import pieces, take
from moekit.config.families import family_for, family_named
from moekit.config.model import ModelConfig
from moekit.config.presets.load import load_run
from moekit.model.transformer import Transformer

PRESETS = ["deepseek-v2-lite", "deepseek-v2", "mixtral-8x7b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"]
HALVES = {"mixtral": ("w1", "w3", "w2"), "": ("gate_proj", "up_proj", "down_proj")}


def ours(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        found = pieces(shapes, family_for(config).names(config))
        return {piece.hub: tuple(take(tensors[piece.ours], piece).shape) for piece in found}


def theirs(data: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of the class in transformers, its stacks of experts taken apart as files hold them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**data))
    gate, up, down = HALVES.get(data["model_type"], HALVES[""])
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        hub = name.replace(".mlp.", ".block_sparse_moe.") if data["model_type"] == "mixtral" else name
        place = hub.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            half = (tensor.shape[1] // 2, tensor.shape[2])
            found |= {f"{place}.{i}.{part}.weight": half for i in range(len(tensor)) for part in (gate, up)}
        elif name.endswith("experts.down_proj"):
            found |= {f"{place}.{i}.{down}.weight": tuple(tensor.shape[1:]) for i in range(len(tensor))}
        else:
            found[hub] = tuple(tensor.shape)
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_those_of_the_class_in_transformers(name: str) -> None:
    config = load_run(name).model
    data = family_for(config).to_hub(config)
    assert data is not None
    assert ours(config) == theirs(data)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("olmoe-1b-7b", 3219),
        # Per layer 2 norms and 4 projections; 3 dense matrices, or a router, 3 shared and 3 x 64 routed ones.
        ("deepseek-moe-16b", 3 + 28 * 6 + 3 + 27 * (1 + 3 + 3 * 64)),
    ],
)
def test_there_are_as_many_tensors_as_published(name: str, tensors: int) -> None:
    assert len(ours(load_run(name).model)) == tensors


def test_the_first_deepseek_names_its_tensors_as_the_second_but_for_the_attention() -> None:
    def outside(name: str) -> set[str]:
        return {hub for hub in ours(load_run(name).model) if "self_attn" not in hub and ".27." not in hub}

    assert outside("deepseek-moe-16b") == outside("deepseek-v2-lite")


@pytest.mark.parametrize("name", [*PRESETS, "deepseek-v3"])
def test_transformers_reads_our_description_without_a_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_run(name).model
    family = family_for(config)
    (tmp_path / "config.json").write_text(json.dumps(family.to_hub(config)), "utf-8")
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        found = AutoConfig.from_pretrained(tmp_path)
    transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert hasattr(transformers, found.architectures[0])
    assert family_named(family.model_type, "").from_hub(found.to_dict()).rope == config.rope
