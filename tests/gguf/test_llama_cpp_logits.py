"""llama.cpp computes from the file what moekit computes from the weights."""

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from gguf_cases import CASES, export, random_ids, random_model, reshaped

from moekit.config.model import ModelConfig
from moekit.model.transformer import Transformer

pytest.importorskip("llama_cpp")
oracle = pytest.importorskip("llama_oracle")

EACH = (
    "deepseek2-v2-yarn",
    "deepseek2-v3",
    "deepseek-groups",
    "mixtral",
    "olmoe",
    "qwen2moe",
    "qwen3moe",
    "llama-yarn",
    "qwen3",
)
"""One model for each architecture."""


@torch.no_grad()
def ours(model: Transformer, ids: torch.Tensor) -> np.ndarray:
    return model(ids.unsqueeze(0)).logits[0].numpy()


def relative_error(theirs: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(theirs - wanted).max() / np.abs(wanted).max())


def least_cosine(theirs: np.ndarray, wanted: np.ndarray) -> float:
    lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((theirs * wanted).sum(axis=1) / lengths).min())


def check_logits(config: ModelConfig, seed: int, path: Path) -> None:
    model, ids = random_model(config, seed), random_ids(config.vocab_size, 24, seed)
    export(model, path, "float32")
    theirs, wanted = oracle.logits(path, ids.tolist()), ours(model, ids)
    assert relative_error(theirs, wanted) < 3e-5
    assert least_cosine(theirs, wanted) > 0.999999


@pytest.mark.parametrize("name", CASES)
def test_logits_in_float32_are_ours(name: str, tmp_path: Path) -> None:
    check_logits(CASES[name], 3, tmp_path / "model.gguf")


@pytest.mark.parametrize("seed", (1, 2, 5))
@pytest.mark.parametrize("name", EACH)
def test_no_size_is_special(name: str, seed: int, tmp_path: Path) -> None:
    check_logits(reshaped(CASES[name], seed), seed, tmp_path / "model.gguf")


@torch.no_grad()
def decisive(config: ModelConfig, ids: torch.Tensor) -> Transformer:
    """A model that chooses the same experts under errors larger than those of rounding, which flip near ties."""
    return next(model for seed in range(200) if is_decisive(model := random_model(config, seed), ids))


def is_decisive(model: Transformer, ids: torch.Tensor) -> bool:
    wanted, generator = chosen_experts(model, ids), torch.Generator().manual_seed(0)
    for _ in range(4):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1 + 0.005 * torch.randn(parameter.shape, generator=generator))
        if not all(map(torch.equal, chosen_experts(other, ids), wanted)):
            return False
    return True


def chosen_experts(model: Transformer, ids: torch.Tensor) -> list[torch.Tensor]:
    return [routing.experts.sort().values for routing in model(ids.unsqueeze(0)).routings]


@pytest.mark.parametrize(("dtype", "cosine"), [("float16", 0.999), ("bfloat16", 0.99)])
@pytest.mark.parametrize("name", EACH)
def test_narrow_files_differ_by_rounding(
    name: str, dtype: Literal["float16", "bfloat16"], cosine: float, tmp_path: Path
) -> None:
    ids = random_ids(CASES[name].vocab_size, 8, 5)
    model = decisive(CASES[name], ids)
    export(model, tmp_path / "model.gguf", dtype)
    assert least_cosine(oracle.logits(tmp_path / "model.gguf", ids.tolist()), ours(model, ids)) > cosine


@pytest.mark.parametrize("name", EACH)
def test_greedy_texts_agree(name: str, tmp_path: Path) -> None:
    model = random_model(CASES[name], 4)
    ids = random_ids(CASES[name].vocab_size, 7, 4).tolist()
    export(model, tmp_path / "model.gguf", "float32")
    wanted = list(ids)
    for _ in range(8):
        wanted.append(int(ours(model, torch.tensor(wanted))[-1].argmax()))
    assert oracle.continued(tmp_path / "model.gguf", ids, 8) == wanted[len(ids) :]
