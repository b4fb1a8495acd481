"""Two small models, one of each attention, and a byte-level tokenizer that fits their vocabulary."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from moekit.config.model import GQAConfig, MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.data.tokenizer import train_tokenizer
from moekit.model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=300,
    width=32,
    n_layers=2,
    dense_width=48,
    attention=MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    moe=MoEConfig(expert_width=16, n_routed=6, top_k=2),
    max_positions=128,
    init_std=0.3,
)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session", params=["mla", "gqa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    gqa = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=8)
    config = TINY if request.param == "mla" else replace(TINY, attention=gqa)
    return Transformer(config, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog; 天地を創造 äöü 🦊🐶\n" * 3], 300)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(1))
