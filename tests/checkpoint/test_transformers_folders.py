"""transformers opens what moekit saves, and moekit what transformers saves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import YARN, attention, moe, random_ids, random_model, small
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

from moekit.checkpoint.load import load
from moekit.checkpoint.save import save_model
from moekit.config.model import ModelConfig, RopeConfig

SAVED = {
    "plain": small(),
    "everything": small(attention=attention(5, True), mtp_depth=1, rope=RopeConfig(theta=5000.0, scaling=YARN)),
    "half-layout": small(rope=RopeConfig(layout="half"), dense_layers=(0, 1)),
    "tied-without-dense": small(tie_embeddings=True, dense_layers=()),
    "no-bias-no-shared": small(moe=moe(biased=False, shared=0), mtp_depth=1),
    "two-shared-one-group": small(moe=moe(groups=1, shared=2, renormalise=False)),
    "all-dense": small(dense_layers=(0, 1, 2)),
    "yarn-without-temperature": small(rope=RopeConfig(scaling=replace(YARN, mscale=1.0, mscale_all_dim=0.0))),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("config", SAVED.values(), ids=SAVED.keys())
def test_transformers_opens_our_folder_to_the_same_logits(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_model(model.state_dict(), config, tmp_path / "model", None)
    theirs, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert isinstance(theirs, DeepseekV3ForCausalLM)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    assert all(name.startswith(f"model.layers.{config.n_layers}.") for name in found["unexpected_keys"])
    with torch.no_grad():
        logits = theirs(random_ids()).logits
        torch.testing.assert_close(model(random_ids()).logits, logits, rtol=1e-4, atol=1e-4)


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compressed-query-with-bias": {"q_lora_rank": 5, "attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "half-layout": {"rope_interleave": False},
    "no-shared": {"n_shared_experts": 0},
    "all-dense": {"first_k_dense_replace": 7},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
        }
    },
    "yarn-defaults": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0}},
}


def their_model(**changes: Any) -> DeepseekV3ForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": 23,
        "hidden_size": 12,
        "intermediate_size": 10,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": None,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes | changes)).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_()
    return model


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("changes", THEIRS.values(), ids=THEIRS.keys())
def test_we_open_their_folder_to_the_same_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = their_model(**changes)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    ours = load(tmp_path)
    assert ours.mtp is None, "transformers announces a prediction module that it does not write"
    with torch.no_grad():
        logits = theirs(random_ids()).logits
        torch.testing.assert_close(ours(random_ids()).logits, logits, rtol=1e-4, atol=1e-4)
