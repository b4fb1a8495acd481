"""Small models whose rows whole groups make up, quantised."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_cases import moe, random_model, small
from safetensors.torch import load_file
from torch import Tensor

from moekit.checkpoint.quantize import quantize
from moekit.checkpoint.save import save_model
from moekit.config.families import family_named
from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.quantisation import Groups
from moekit.model.transformer import Transformer

LATENT = MLAConfig(n_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)


DEEPSEEK = {
    "vocab_size": 23,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "aux_loss_alpha": 0.001,
}


def divisible(**changes: Any) -> ModelConfig:
    """Groups of 32 make up the rows of every matrix; larger ones not those of 96 and 32."""
    experts = replace(moe(), expert_width=32)
    return small(**{"width": 64, "dense_width": 96, "attention": LATENT, "moe": experts} | changes)


def grouped_query(**changes: Any) -> ModelConfig:
    """A model of the first DeepSeek's family."""
    config = family_named("deepseek", "here").from_hub(DEEPSEEK)
    return replace(config, **changes)


def plain_folder(config: ModelConfig, path: Path) -> tuple[Transformer, Path]:
    model = random_model(config)
    save_model(model.state_dict(), config, path, None)
    return model, path


def quantised_folder(config: ModelConfig, path: Path, bits: int = 4, size: int = 32, *kept: str) -> Path:
    """`path/plain` and `path/quantised`; returns the latter."""
    _, source = plain_folder(config, path / "plain")
    quantize(source, path / "quantised", Groups(bits, size, kept))
    return path / "quantised"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
