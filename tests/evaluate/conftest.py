"""A small model, some tokens for it, and a tokenizer that fits its vocabulary."""

import numpy as np
import pytest
import torch
from jaxtyping import UInt16
from tokenizers import Tokenizer

from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.data.tokenizer import train_tokenizer
from moekit.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=300,
    width=32,
    n_layers=2,
    dense_width=48,
    attention=MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=MoEConfig(expert_width=16, n_routed=6, top_k=2),
    max_positions=64,
    init_std=0.3,
)


@pytest.fixture(scope="session")
def model() -> Transformer:
    return Transformer(CONFIG, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tokens() -> UInt16[np.ndarray, "61"]:
    return np.random.default_rng(0).integers(0, 300, 61).astype(np.uint16)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog; 天地を創造 äöü 🦊🐶\n" * 3], 300)
