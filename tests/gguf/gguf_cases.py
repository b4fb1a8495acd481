"""Small models of every structure that llama.cpp knows, with no weight at its initial value."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from moekit.checkpoint.gguf import write_gguf
from moekit.config.balance import BiasBalance
from moekit.config.model import (
    GQAConfig,
    LinearConfig,
    Llama3Config,
    MLAConfig,
    ModelConfig,
    RopeConfig,
    YarnConfig,
)
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.model.transformer import Transformer

V2 = TopKRouting(scale=4.0)
V3 = TopKRouting(
    score="sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, n_groups=4, top_k_groups=2, group_score="top2_sum"
)
MIXTRAL = TopKRouting(order="top_k_then_score")
HALF, INTERLEAVED = RopeConfig(layout="half"), RopeConfig(layout="interleaved", theta=5000.0)


def yarn(layout: Literal["half", "interleaved"], mscale: float, mscale_all_dim: float) -> RopeConfig:
    scaling = YarnConfig(factor=8.0, original_max_positions=16, mscale=mscale, mscale_all_dim=mscale_all_dim)
    return RopeConfig(layout=layout, scaling=scaling)


LINEAR = RopeConfig(layout="half", scaling=LinearConfig(factor=3.0))
LLAMA3 = RopeConfig(layout="half", scaling=Llama3Config(factor=8.0, original_max_positions=32))
GIVEN = RopeConfig(layout="half", scaling=YarnConfig(factor=8.0, original_max_positions=16, attention_factor=1.7))


def experts(routing: TopKRouting = V2, shared: int = 2, gate: bool = False, biased: bool = False) -> MoEConfig:
    balance = (BiasBalance(),) if biased else ()
    return MoEConfig(
        expert_width=24, n_routed=8, n_shared=shared, top_k=3, shared_gate=gate, routing=routing, balance=balance
    )


def mla(**changes: Any) -> MLAConfig:
    sizes = {"n_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    return MLAConfig(**sizes | changes)


def gqa(**changes: Any) -> GQAConfig:
    return GQAConfig(**{"n_heads": 4, "n_kv_heads": 2, "head_dim": 12} | changes)


def small(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "width": 48,
        "n_layers": 3,
        "dense_layers": (0,),
        "dense_width": 40,
        "attention": mla(),
        "rope": INTERLEAVED,
        "moe": experts(),
        "max_positions": 128,
    }
    return ModelConfig(**settings | changes)


V3_MOE, OLMOE_MOE = experts(V3, shared=1, biased=True), experts(TopKRouting(), shared=0)
NORMALISED = experts(TopKRouting(renormalise=True), shared=0)

CASES = {
    "deepseek2-v2": small(),
    "deepseek2-v2-half": small(rope=HALF),
    "deepseek2-v2-yarn": small(rope=yarn("interleaved", 0.707, 0.707)),
    "deepseek2-yarn-without-temperature-of-scores": small(rope=yarn("interleaved", 1.0, 0.0)),
    "deepseek2-yarn-without-temperature": small(rope=yarn("interleaved", 0.0, 0.0)),
    "deepseek2-yarn-of-two-temperatures": small(rope=yarn("half", 0.6, 1.2)),
    "deepseek2-v3": small(attention=mla(q_lora_rank=14), moe=V3_MOE, dense_layers=(0, 1)),
    "deepseek2-v3-yarn": small(attention=mla(q_lora_rank=14), moe=V3_MOE, rope=yarn("interleaved", 1.0, 1.0)),
    "deepseek2-v3-half-yarn": small(attention=mla(q_lora_rank=14), moe=V3_MOE, rope=yarn("half", 1.0, 1.0)),
    "deepseek2-not-normalised-sigmoid": small(moe=experts(TopKRouting(score="sigmoid"), biased=True)),
    "deepseek2-no-shared": small(moe=experts(V3, shared=0, biased=True), dense_layers=()),
    "deepseek2-dense": small(dense_layers=(0, 1, 2)),
    "deepseek2-tied": small(tie_embeddings=True, attention=mla(v_head_dim=21)),
    "deepseek2-prediction": small(mtp_depth=1),
    "deepseek2-as-deep-as-lite": small(n_layers=27),
    "deepseek2-softmax-of-the-chosen": small(moe=experts(MIXTRAL, biased=True)),
    "deepseek2-linear": small(rope=LINEAR),
    "deepseek2-yarn-of-given-factor": small(rope=GIVEN),
    "deepseek2-wide-shared": small(moe=replace(V3_MOE, n_shared=1, shared_expert_width=48)),
    "deepseek": small(attention=gqa(), rope=HALF, moe=experts(TopKRouting(scale=1.5))),
    "deepseek-interleaved-bias": small(attention=gqa(n_kv_heads=4, qkv_bias=True)),
    "deepseek-no-shared-yarn": small(
        attention=gqa(n_kv_heads=4), rope=yarn("half", 1.0, 1.0), moe=experts(TopKRouting(), shared=0)
    ),
    "deepseek-groups": small(
        attention=gqa(), rope=HALF, moe=experts(TopKRouting(n_groups=4, top_k_groups=2, group_score="top2_sum"))
    ),
    "mixtral": small(attention=gqa(), rope=HALF, dense_layers=(), moe=experts(MIXTRAL, shared=0)),
    "mixtral-wide-bias": small(
        attention=gqa(n_heads=5, n_kv_heads=1, head_dim=16, qkv_bias=True, out_bias=True),
        dense_layers=(), moe=NORMALISED, tie_embeddings=True,
    ),
    "olmoe": small(
        attention=gqa(n_kv_heads=4, qk_norm="full"), rope=HALF, dense_layers=(), moe=OLMOE_MOE, norm_epsilon=1e-5
    ),
    "olmoe-interleaved-tied": small(
        attention=gqa(n_kv_heads=4, qk_norm="full"), dense_layers=(), moe=OLMOE_MOE, tie_embeddings=True
    ),
    "qwen2moe": small(
        attention=gqa(n_kv_heads=4, qkv_bias=True), rope=HALF, dense_layers=(), moe=experts(TopKRouting(), gate=True)
    ),
    "qwen2moe-tied": small(
        attention=gqa(), dense_layers=(), moe=experts(TopKRouting(), gate=True), tie_embeddings=True
    ),
    "qwen3moe": small(attention=gqa(head_dim=16, qk_norm="head"), rope=HALF, dense_layers=(), moe=NORMALISED),
    "qwen3moe-yarn": small(
        attention=gqa(head_dim=16, qk_norm="head"), rope=yarn("half", 1.0, 0.0), dense_layers=(), moe=NORMALISED
    ),
    "llama": small(attention=gqa(), rope=HALF, dense_layers=(0, 1, 2)),
    "llama-bias": small(attention=gqa(qkv_bias=True, out_bias=True), rope=HALF, dense_layers=(0, 1, 2)),
    "llama-yarn": small(attention=gqa(), rope=yarn("half", 0.9, 0.4), dense_layers=(0, 1, 2), tie_embeddings=True),
    "llama-linear": small(attention=gqa(), rope=LINEAR, dense_layers=(0, 1, 2)),
    "llama-of-3": small(attention=gqa(), rope=LLAMA3, dense_layers=(0, 1, 2)),
    "mixtral-of-3": small(attention=gqa(), rope=LLAMA3, dense_layers=(), moe=NORMALISED),
    "llama-yarn-of-given-factor": small(attention=gqa(), rope=GIVEN, dense_layers=(0, 1, 2)),
    "qwen2moe-wide-shared": small(
        attention=gqa(), dense_layers=(), moe=replace(experts(TopKRouting(), gate=True), shared_expert_width=7)
    ),
    "qwen3": small(attention=gqa(qk_norm="head"), dense_layers=(0, 1, 2)),
}  # fmt: skip
"""By the architecture that llama.cpp runs them as."""


@torch.no_grad()
def random_model(config: ModelConfig, seed: int) -> Transformer:
    """No weight at its initial value: norms around one, biases of the selection far from zero."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator).eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def export(model: Transformer, path: Path, dtype: Literal["float32", "float16", "bfloat16"]) -> list[str]:
    return write_gguf(model.config, model.state_dict().__getitem__, path, dtype, None)


def reshaped(config: ModelConfig, seed: int) -> ModelConfig:
    """The same structure in other sizes, odd ones among them."""
    draw = random.Random(seed).randint
    attention = config.attention
    moe = replace(config.moe, n_routed=4 * draw(2, 4), top_k=draw(2, 4))
    if moe.shared_expert_width == 0:
        moe = replace(moe, expert_width=draw(1, 30))
    if isinstance(attention, MLAConfig):
        attention = replace(
            attention,
            n_heads=draw(1, 5),
            q_lora_rank=attention.q_lora_rank and draw(1, 30),
            kv_lora_rank=draw(1, 40),
            qk_nope_head_dim=draw(1, 20),
            qk_rope_head_dim=2 * draw(1, 10),
            v_head_dim=draw(1, 20),
        )
        width = draw(1, 70)
    else:
        n_kv_heads = draw(1, 3)
        n_heads = n_kv_heads if attention.n_heads == attention.n_kv_heads else n_kv_heads * draw(1, 3)
        attention = replace(attention, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=2 * draw(1, 12))
        width = n_heads * attention.head_dim
    return replace(config, vocab_size=draw(2, 90), width=width, dense_width=draw(1, 50), attention=attention, moe=moe)


def random_ids(vocab_size: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))
