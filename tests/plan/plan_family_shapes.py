"""Random and released configurations of the families that the planner counts, and transformers' own count of each."""

import random
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SEEDS = range(25)

CORRECTION = "e_score_correction_bias"


def transformers_count(model_type: str, given: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Parameters of transformers' model, tied ones once, with the selection bias; and its `config.json`."""
    config = AutoConfig.for_model(model_type, **given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith(CORRECTION)]
    return sum(tensor.numel() for tensor in (*model.parameters(), *biases)), config.to_dict()


def _trunk(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([1, 2, 3])
    n_kv_heads = rng.choice([1, 2])
    return {
        "vocab_size": rng.choice([11, 32]),
        "hidden_size": 12 * rng.choice([1, 2]),
        "intermediate_size": rng.choice([5, 16]),
        "num_hidden_layers": rng.choice([1, 2, 5]),
        "num_attention_heads": heads * n_kv_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": rng.random() < 0.4,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _flip(rng: random.Random) -> bool:
    return rng.random() < 0.5


def _some_head_dim(rng: random.Random) -> dict[str, Any]:
    return {"head_dim": 2 * rng.choice([2, 5])} if _flip(rng) else {}


def glm4_moe(rng: random.Random) -> dict[str, Any]:
    groups = rng.choice([1, 2, 4])
    return {
        **_trunk(rng),
        **_some_head_dim(rng),
        "attention_bias": _flip(rng),
        "use_qk_norm": _flip(rng),
        "moe_intermediate_size": rng.choice([3, 8]),
        "n_routed_experts": 8,
        "num_experts_per_tok": rng.choice([1, 2]),
        "n_shared_experts": rng.choice([1, 2]),
        "n_group": groups,
        "topk_group": rng.randint(1, groups),
        "first_k_dense_replace": rng.choice([0, 1, 3]),
        "num_mtp_layers": 0,
    }


def gpt_oss(rng: random.Random) -> dict[str, Any]:
    given = _trunk(rng) | {"head_dim": rng.choice([4, 10]), "attention_bias": _flip(rng)}
    if _flip(rng):
        kinds = ["sliding_attention", "full_attention"]
        given["layer_types"] = [rng.choice(kinds) for _ in range(given["num_hidden_layers"])]
    return given | {"num_local_experts": rng.choice([4, 7]), "num_experts_per_tok": rng.choice([1, 3])}


def dbrx(rng: random.Random) -> dict[str, Any]:
    n_kv_heads = rng.choice([1, 2])
    n_heads = n_kv_heads * rng.choice([1, 2])
    attention = {"kv_n_heads": n_kv_heads, "clip_qkv": rng.choice([None, 8]), "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": rng.choice([5, 16]), "moe_num_experts": rng.choice([3, 8]), "moe_top_k": 2}
    return {
        "vocab_size": rng.choice([11, 32]),
        "d_model": n_heads * rng.choice([4, 6]),
        "n_heads": n_heads,
        "n_layers": rng.choice([1, 2, 5]),
        "max_seq_len": 64,
        "attn_config": attention,
        "ffn_config": experts,
        "pad_token_id": None,
    }


def phimoe(rng: random.Random) -> dict[str, Any]:
    return {
        **_trunk(rng),
        **_some_head_dim(rng),
        "attention_bias": _flip(rng),
        "lm_head_bias": _flip(rng),
        "sliding_window": rng.choice([None, 16]),
        "num_local_experts": rng.choice([4, 7]),
        "num_experts_per_tok": 2,
    }


def granitemoe(rng: random.Random) -> dict[str, Any]:
    given = _trunk(rng) | {"attention_bias": _flip(rng), "num_local_experts": rng.choice([4, 7])}
    return given | {"num_experts_per_tok": rng.choice([1, 2]), "embedding_multiplier": 12.0}


def ernie4_5_moe(rng: random.Random) -> dict[str, Any]:
    return {
        **_trunk(rng),
        **_some_head_dim(rng),
        "use_bias": _flip(rng),
        "moe_intermediate_size": rng.choice([3, 8]),
        "moe_k": rng.choice([1, 2]),
        "moe_num_experts": rng.choice([4, 7]),
        "moe_num_shared_experts": rng.choice([0, 1, 2]),
        "moe_layer_start_index": rng.choice([0, 1, 2]),
        "moe_layer_end_index": rng.choice([-1, 2, 3, 9]),
        "moe_layer_interval": rng.choice([1, 2]),
    }


def hunyuan_v1_moe(rng: random.Random) -> dict[str, Any]:
    given = _trunk(rng) | {"head_dim": rng.choice([4, 10]), "attention_bias": _flip(rng), "num_experts": 6}
    return given | {"moe_topk": rng.choice([2, [rng.choice([1, 3]) for _ in range(given["num_hidden_layers"])]])}


SHAPES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    shape.__name__: shape for shape in (glm4_moe, gpt_oss, dbrx, phimoe, granitemoe, ernie4_5_moe, hunyuan_v1_moe)
}
