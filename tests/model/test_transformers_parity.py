"""With the same weights, moekit and Hugging Face transformers compute the same logits. This oracle decides."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hugging_face_twin import copied, randomise  # noqa: E402

from moekit.config.balance import BiasBalance  # noqa: E402
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig  # noqa: E402
from moekit.config.moe import MoEConfig, TopKRouting  # noqa: E402
from oracle.compare import relative_error  # noqa: E402

TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6, "v_head_dim": 5, "moe_intermediate_size": 7}
THETA = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
SHAPES = [(0, 1, 1), (1, 2, 7), (2, 3, 40)]
"""Seed, sequences, tokens in each."""
shapes = pytest.mark.parametrize(("seed", "batch", "length"), SHAPES)


@torch.no_grad()
def check_same_logits(hf_config: Any, config: ModelConfig, seed: int, batch: int, length: int) -> None:
    theirs = transformers.AutoModelForCausalLM.from_config(
        hf_config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    randomise(theirs, seed)
    mine = copied(config, theirs)
    ids = torch.randint(0, 31, (batch, length), generator=torch.Generator().manual_seed(seed))
    assert relative_error(mine(ids).logits, theirs(input_ids=ids).logits) <= 1e-4


def rope_of(parameters: dict[str, Any], layout: str) -> RopeConfig:
    scaling = None
    if parameters["rope_type"] == "yarn":
        scaling = YarnConfig(
            factor=parameters["factor"],
            original_max_positions=parameters["original_max_position_embeddings"],
            mscale=parameters["mscale"],
            mscale_all_dim=parameters["mscale_all_dim"],
        )
    return RopeConfig(theta=parameters["rope_theta"], layout=layout, scaling=scaling)


def model_config(hf: Any, **settings: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=31,
        width=16,
        n_layers=3,
        dense_width=12,
        norm_epsilon=hf.rms_norm_eps,
        max_positions=64,
        **settings,
    )


def latent(q_lora_rank: int | None, bias: bool = False) -> MLAConfig:
    return MLAConfig(
        n_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=6,
        qk_nope_head_dim=4,
        qk_rope_head_dim=6,
        v_head_dim=5,
        bias=bias,
    )


@shapes
@pytest.mark.parametrize("q_lora_rank", [None, 5])
@pytest.mark.parametrize("rope", [THETA, YARN, YARN | {"mscale": 1.0}], ids=["plain", "yarn", "yarn-two-temperatures"])
@pytest.mark.parametrize("interleave", [True, False])
def test_deepseek_v3(seed: int, batch: int, length: int, q_lora_rank: int | None, rope: dict, interleave: bool) -> None:
    hf = transformers.DeepseekV3Config(
        **TINY,
        **LATENT,
        q_lora_rank=q_lora_rank,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        rope_parameters=rope,
        rope_interleave=interleave,
        rms_norm_eps=1e-5,
        num_key_value_heads=4,
        num_mtp_layers=0,
    )
    routing = TopKRouting(
        score="sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, n_groups=4, top_k_groups=2, group_score="top2_sum"
    )
    moe = MoEConfig(expert_width=7, n_routed=8, n_shared=2, top_k=3, routing=routing, balance=(BiasBalance(),))
    layout = "interleaved" if interleave else "half"
    config = model_config(hf, attention=latent(q_lora_rank), rope=rope_of(rope, layout), moe=moe, dense_layers=(0,))
    check_same_logits(hf, config, seed, batch, length)


@shapes
@pytest.mark.parametrize("q_lora_rank", [None, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("rope", [THETA, YARN], ids=["plain", "yarn"])
def test_deepseek_v2(
    seed: int, batch: int, length: int, q_lora_rank: int | None, bias: bool, method: str, rope: dict
) -> None:
    hf = transformers.DeepseekV2Config(
        **TINY,
        **LATENT,
        q_lora_rank=q_lora_rank,
        attention_bias=bias,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        topk_method=method,
        routed_scaling_factor=16.0,
        first_k_dense_replace=1,
        rope_parameters=rope,
    )
    limited = method == "group_limited_greedy"
    routing = TopKRouting(scale=16.0, n_groups=4, top_k_groups=2) if limited else TopKRouting(scale=16.0)
    config = model_config(
        hf,
        attention=latent(q_lora_rank, bias),
        rope=rope_of(rope, "interleaved"),
        moe=MoEConfig(expert_width=7, n_routed=8, n_shared=2, top_k=3, routing=routing),
        dense_layers=(0,),
    )
    check_same_logits(hf, config, seed, batch, length)


@shapes
@pytest.mark.parametrize("order", ["top_k_then_score", "score_then_top_k"])
def test_mixtral(seed: int, batch: int, length: int, order: str) -> None:
    hf = transformers.MixtralConfig(
        **TINY | {"intermediate_size": 7},
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_parameters=THETA | {"rope_theta": 1e6},
    )
    routing = TopKRouting(order=order, renormalise=order == "score_then_top_k")
    config = model_config(
        hf,
        attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=4),
        rope=RopeConfig(theta=1e6, layout="half"),
        moe=MoEConfig(expert_width=7, n_routed=8, n_shared=0, top_k=2, routing=routing),
        dense_layers=(),
    )
    check_same_logits(hf, config, seed, batch, length)


@shapes
@pytest.mark.parametrize("renormalise", [False, True])
def test_olmoe(seed: int, batch: int, length: int, renormalise: bool) -> None:
    hf = transformers.OlmoeConfig(
        **TINY | {"intermediate_size": 7},
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=renormalise,
        rope_parameters=THETA,
    )
    config = model_config(
        hf,
        attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=4, qk_norm="full"),
        rope=RopeConfig(layout="half"),
        moe=MoEConfig(expert_width=7, n_routed=8, n_shared=0, top_k=3, routing=TopKRouting(renormalise=renormalise)),
        dense_layers=(),
    )
    check_same_logits(hf, config, seed, batch, length)


@shapes
@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_qwen2_moe(seed: int, batch: int, length: int, dense_layers: tuple[int, ...]) -> None:
    hf = transformers.Qwen2MoeConfig(
        **TINY,
        num_key_value_heads=2,
        moe_intermediate_size=7,
        shared_expert_intermediate_size=28,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=list(dense_layers),
        rope_parameters=THETA | {"rope_theta": 1e6},
    )
    config = model_config(
        hf,
        attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=4, qkv_bias=True),
        rope=RopeConfig(theta=1e6, layout="half"),
        moe=MoEConfig(expert_width=7, n_routed=8, n_shared=4, top_k=3, shared_gate=True),
        dense_layers=dense_layers,
    )
    check_same_logits(hf, config, seed, batch, length)


@shapes
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dense_layers", [(), (1,)])
def test_qwen3_moe(seed: int, batch: int, length: int, renormalise: bool, dense_layers: tuple[int, ...]) -> None:
    hf = transformers.Qwen3MoeConfig(
        **TINY,
        head_dim=6,
        num_key_value_heads=2,
        moe_intermediate_size=7,
        num_local_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=renormalise,
        mlp_only_layers=list(dense_layers),
        rope_parameters=THETA | {"rope_theta": 1e6},
    )
    config = model_config(
        hf,
        attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm="head"),
        rope=RopeConfig(theta=1e6, layout="half"),
        moe=MoEConfig(expert_width=7, n_routed=8, n_shared=0, top_k=3, routing=TopKRouting(renormalise=renormalise)),
        dense_layers=dense_layers,
    )
    check_same_logits(hf, config, seed, batch, length)
