"""The file: whole or absent, each tensor asked for once, and nothing that llama.cpp would compute otherwise."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_cases import CASES, LLAMA3, MIXTRAL, V3_MOE, experts, export, gqa, mla, random_model, small
from torch import Tensor

from moekit.checkpoint.gguf import write_gguf
from moekit.config.errors import ConfigError, InputError
from moekit.config.model import ModelConfig, RopeConfig, YarnConfig
from moekit.config.routing import TopKRouting

reader = pytest.importorskip("gguf.gguf_reader")

EVERYWHERE: dict[str, Any] = {"dense_layers": (), "rope": RopeConfig(layout="half")}
DENSE: dict[str, Any] = {"dense_layers": (0, 1, 2)}
QWEN3: dict[str, Any] = EVERYWHERE | {"attention": gqa(qk_norm="head")}
OLMOE: dict[str, Any] = EVERYWHERE | {"attention": gqa(n_kv_heads=4, qk_norm="full")}
NORMALISED = TopKRouting(renormalise=True)

REFUSED = {
    "attention.bias": small(attention=mla(bias=True)),
    "attention.q_lora_rank": small(attention=mla(q_lora_rank=8), n_layers=27),
    "attention.out_bias": small(attention=gqa(out_bias=True)),
    "attention.head_dim": small(attention=gqa(head_dim=16)),
    "attention.clip_qkv": small(**OLMOE | {"attention": gqa(n_kv_heads=4, qk_norm="full", clip_qkv=8.0)}),
    "attention.qk_norm": small(attention=gqa(n_kv_heads=4, qk_norm="full"), **DENSE),
    "rope.scaling.beta_fast": small(rope=RopeConfig(scaling=YarnConfig(beta_fast=16.0))),
    "rope.scaling.beta_slow": small(rope=RopeConfig(scaling=YarnConfig(beta_slow=2.0))),
    "rope.scaling.truncate": small(rope=RopeConfig(scaling=YarnConfig(truncate=False))),
    "rope.scaling.factor": small(rope=RopeConfig(scaling=YarnConfig(factor=1.0, attention_factor=2.0))),
    "rope.scaling.kind": small(rope=LLAMA3),
    "n_layers": small(n_layers=513, dense_layers=tuple(range(513))),
    "dense_layers": small(dense_layers=(1,)),
    "moe.n_routed": small(moe=replace(experts(), n_routed=1025)),
    "moe.n_shared": small(**OLMOE, moe=experts(TopKRouting())),
    "moe.shared_gate": small(moe=experts(gate=True)),
    "moe.shared_expert_width": small(moe=replace(experts(), shared_expert_width=7)),
    "moe.routing.score": small(attention=gqa(), moe=experts(TopKRouting(score="sigmoid"))),
    "moe.balance.bias": small(attention=gqa(), moe=experts(biased=True)),
    "moe.routing.scale": small(**QWEN3, moe=experts(replace(NORMALISED, scale=2.0), shared=0)),
    "moe.routing.renormalise": small(**OLMOE, moe=experts(NORMALISED, shared=0)),
    "moe.routing.epsilon": small(moe=experts(replace(NORMALISED, epsilon=0.001))),
    "moe.routing.group_score": small(moe=experts(TopKRouting(n_groups=4, top_k_groups=2))),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_gguf(REFUSED[key], no_tensor, tmp_path / "model.gguf", "float32", None)
    assert caught.value.key == key
    assert list(tmp_path.iterdir()) == []


def no_tensor(name: str) -> Tensor:
    raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize(
    "config",
    [
        small(**QWEN3, moe=experts(TopKRouting(), shared=0)),
        small(attention=gqa(), moe=experts(NORMALISED)),
        small(**EVERYWHERE | {"attention": gqa(), "moe": experts(MIXTRAL, gate=True)}),
    ],
)
def test_an_architecture_normalises_always_or_never(config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(always|never) divides the weights by their sum"):
        write_gguf(config, no_tensor, tmp_path / "model.gguf", "float32", None)


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        write_gguf(small(), no_tensor, path, "float32", None)
    assert path.read_text() == "mine"


def test_a_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_gguf(small(), no_tensor, tmp_path / "none" / "model.gguf", "float32", None)


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    state = random_model(small(), 0).state_dict()

    def failing(name: str) -> Tensor:
        if name.startswith("layers.2"):
            raise InputError("no more")
        assert not (tmp_path / "model.gguf").exists()
        return state[name]

    with pytest.raises(InputError, match="no more"):
        write_gguf(small(), failing, tmp_path / "model.gguf", "float32", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CASES)
def test_each_tensor_is_asked_for_once(name: str, tmp_path: Path) -> None:
    state, asked = random_model(CASES[name], 0).state_dict(), []

    def counted(name: str) -> Tensor:
        asked.append(name)
        return state[name]

    write_gguf(CASES[name], counted, tmp_path / "model.gguf", "float32", None)
    left_out = {"head.weight"} if CASES[name].tie_embeddings else set()
    assert sorted(asked) == sorted(n for n in state.keys() - left_out if not n.startswith("mtp."))


def test_matrices_are_narrow_and_what_decides_is_not(tmp_path: Path) -> None:
    export(random_model(small(moe=V3_MOE), 0), tmp_path / "model.gguf", "bfloat16")
    wide = {t.name for t in reader.GGUFReader(tmp_path / "model.gguf").tensors if t.tensor_type.name == "F32"}
    narrow = {t.name for t in reader.GGUFReader(tmp_path / "model.gguf").tensors if t.tensor_type.name == "BF16"}
    assert {"blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.1.attn_norm.weight"} <= wide
    assert {"token_embd.weight", "blk.1.ffn_up_exps.weight", "blk.0.attn_k_b.weight"} <= narrow


def test_what_is_left_out_or_differs_is_said(tmp_path: Path) -> None:
    config = small(mtp_depth=1, norm_epsilon=1e-5)
    notes = export(random_model(config, 0), tmp_path / "model.gguf", "float32")
    assert any("multi-token prediction" in note for note in notes)
    assert any("norm_epsilon" in note for note in notes)


def test_weights_too_large_for_float16_are_an_input_error(tmp_path: Path) -> None:
    model = random_model(small(), 0)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"output\.weight.*float16"):
        export(model, tmp_path / "model.gguf", "float16")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "model.gguf", "bfloat16")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.modules["gguf"] = None
from moekit.checkpoint.gguf import write_gguf
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
try:
    write_gguf(ModelConfig(), None, Path({str(tmp_path)!r}) / "model.gguf", "float32", None)
except InputError as error:
    print(error, "|", error.hint)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "the package `gguf`" in done.stdout
    assert "pip install 'moekit[gguf]'" in done.stdout
