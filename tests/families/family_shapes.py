"""Small transformers models of every family, of random shapes and with random weights."""

import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 31
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def scaling(rng: random.Random, latent: bool) -> dict[str, Any]:
    """One of the kinds of rotary positions, with and without the fields that may be left out."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        yarn,
        yarn | {"beta_fast": 4.0, "beta_slow": 2.0, "truncate": False},
        yarn | {"mscale": 0.7, "mscale_all_dim": 0.9},
        yarn | {"mscale": 0.7, "mscale_all_dim": 0.9, "attention_factor": 1.3},
        yarn | {"attention_factor": 0.8},
    ]
    if not latent:
        kinds += [yarn | {"mscale": 0.7}, yarn | {"mscale_all_dim": 0.7}, yarn | {"factor": None}]
    return rng.choice(kinds) | {"rope_theta": rng.choice([5000.0, 1e6])}


def trunk(rng: random.Random, latent: bool = False) -> dict[str, Any]:
    """What every family has."""
    return {
        "vocab_size": VOCABULARY,
        "intermediate_size": rng.choice([7, 12]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "initializer_range": rng.choice([0.02, 0.006]),
        "tie_word_embeddings": rng.random() < 0.3,
        "rope_parameters": scaling(rng, latent),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def heads(rng: random.Random, width_follows: bool = False, width_divides: bool = False) -> dict[str, Any]:
    """Grouped-query heads: of the width's equal share, or of a width of their own."""
    n_kv_heads, head_dim = rng.choice([1, 2]), rng.choice([2, 6, 10])
    n_heads = n_kv_heads * rng.choice([1, 2, 3])
    sizes = {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads}
    if width_follows:
        return sizes | {"hidden_size": n_heads * head_dim}
    hidden_size = n_heads * rng.choice([3, 4]) if width_divides else rng.choice([12, 15, 20])
    return sizes | {"hidden_size": hidden_size, "head_dim": head_dim}


def latent_heads(rng: random.Random, even: bool = False) -> dict[str, Any]:
    """`even`: transformers takes the rotary part of a row as complex numbers, which must start at an even place."""
    n_heads = rng.choice([1, 2, 3])
    return {
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "hidden_size": 12,
        "q_lora_rank": rng.choice([None, 5]),
        "kv_lora_rank": 4 if even else rng.choice([4, 7]),
        "qk_nope_head_dim": 4 if even else rng.choice([4, 5]),
        "qk_rope_head_dim": rng.choice([2, 6]),
        "v_head_dim": rng.choice([3, 5, 12]),
        "attention_bias": rng.random() < 0.4,
    }


def choice(rng: random.Random, count: str) -> dict[str, Any]:
    n_experts = rng.choice([4, 6])
    top_k = rng.choice([1, 2, 3, n_experts])
    return {count: n_experts, "num_experts_per_tok": top_k}


def first_dense(rng: random.Random) -> dict[str, Any]:
    return {
        "first_k_dense_replace": rng.choice([0, 1, 1, 5]),
        "moe_intermediate_size": rng.choice([5, 8]),
        "n_shared_experts": rng.choice([0, 1, 2]),
    }


def groups(rng: random.Random) -> dict[str, Any]:
    n_group = rng.choice([1, 2, 4])
    topk_group = rng.randint(1, n_group)
    top_k = rng.randint(1, topk_group * 8 // n_group)
    return {"n_routed_experts": 8, "n_group": n_group, "topk_group": topk_group, "num_experts_per_tok": top_k}


def listed_dense(rng: random.Random) -> dict[str, Any]:
    return {
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": [layer for layer in range(3) if rng.random() < 0.3],
        "moe_intermediate_size": rng.choice([5, 8]),
        "norm_topk_prob": rng.random() < 0.5,
    }


def deepseek_v2(rng: random.Random) -> dict[str, Any]:
    scale = {
        "routed_scaling_factor": rng.choice([1.0, 16.0]),
        "topk_method": rng.choice(["greedy", "group_limited_greedy"]),
    }
    return trunk(rng, True) | latent_heads(rng, even=True) | first_dense(rng) | groups(rng) | scale


def deepseek_v3(rng: random.Random) -> dict[str, Any]:
    flags = {"norm_topk_prob": rng.random() < 0.7, "rope_interleave": rng.random() < 0.7}
    return trunk(rng, True) | latent_heads(rng) | first_dense(rng) | groups(rng) | flags


def mixtral(rng: random.Random) -> dict[str, Any]:
    return trunk(rng) | heads(rng) | choice(rng, "num_local_experts") | {"sliding_window": rng.choice([None, 64])}


def olmoe(rng: random.Random) -> dict[str, Any]:
    own = {
        "attention_bias": rng.random() < 0.4,
        "clip_qkv": rng.choice([None, 0.5]),
        "norm_topk_prob": rng.random() < 0.5,
    }
    return trunk(rng) | heads(rng, width_follows=True) | choice(rng, "num_experts") | own


def qwen2_moe(rng: random.Random) -> dict[str, Any]:
    own = {"qkv_bias": rng.random() < 0.7, "shared_expert_intermediate_size": rng.choice([0, 5, 10, 11, 40])}
    return trunk(rng) | heads(rng) | choice(rng, "num_experts") | listed_dense(rng) | own


def qwen3_moe(rng: random.Random) -> dict[str, Any]:
    own = {"attention_bias": rng.random() < 0.4}
    return trunk(rng) | heads(rng) | choice(rng, "num_experts") | listed_dense(rng) | own


def llama(rng: random.Random) -> dict[str, Any]:
    return trunk(rng) | heads(rng, width_divides=True) | {"attention_bias": rng.random() < 0.4}


def qwen2(rng: random.Random) -> dict[str, Any]:
    return trunk(rng) | heads(rng)


def qwen3(rng: random.Random) -> dict[str, Any]:
    return trunk(rng) | heads(rng) | {"attention_bias": rng.random() < 0.4}


SHAPES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
"""Every family that has a class in transformers."""


def their_config(family: str, seed: int) -> PreTrainedConfig:
    return transformers.AutoConfig.for_model(family, **SHAPES[family](random.Random(f"{family} {seed}")))


@torch.no_grad()
def their_model(family: str, seed: int) -> PreTrainedModel:
    """Norms around 1, everything else around 0, selection biases included."""
    model = transformers.AutoModelForCausalLM.from_config(their_config(family, seed), **EAGER).eval()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)


def ids_of(seed: int, length: int = 20) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
