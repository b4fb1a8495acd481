"""transformers, given the same folder, generates the same tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from moekit.checkpoint.load import load, stop_ids
from moekit.checkpoint.save import save_model
from moekit.config.balance import BiasBalance
from moekit.config.model import ModelConfig
from moekit.config.routing import TopKRouting
from moekit.generation.generate import generate
from moekit.model.transformer import Transformer

ROUTING = TopKRouting(score="sigmoid", renormalise=True, epsilon=1e-20, n_groups=2, group_score="top2_sum")


@pytest.fixture
def folder(tmp_path: Path, tiny: ModelConfig, tokenizer: Tokenizer) -> Path:
    """A DeepSeek-V3 folder."""
    config = replace(tiny, moe=replace(tiny.moe, routing=ROUTING, balance=(BiasBalance(),)))
    model = Transformer(config, generator=torch.Generator().manual_seed(0))
    save_model(model.state_dict(), config, tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize(("penalty", "padding"), [(1.0, (0, 3, 5)), (1.2, (0, 0, 0))])
def test_greedy_tokens_of_a_batch_are_those_of_transformers(
    folder: Path, ids: torch.Tensor, penalty: float, padding: tuple[int, ...]
) -> None:
    # Padding and penalty apart: transformers penalises the padding too.
    transformers = pytest.importorskip("transformers")
    mask = torch.arange(7) >= torch.tensor(padding).unsqueeze(1)
    ids = ids.masked_fill(~mask, 0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").generate(
        ids, attention_mask=mask.long(), max_new_tokens=16, do_sample=False, repetition_penalty=penalty, pad_token_id=0
    )
    ours = generate(
        load(folder),
        ids,
        max_new_tokens=16,
        temperature=0.0,
        repetition_penalty=penalty,
        mask=mask,
        stop_ids=stop_ids(folder),
    )
    assert torch.equal(ours, theirs)
