"""GGUF files of every architecture that the planner knows, and headers written by hand."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.checkpoint.gguf import DType, write_gguf
from moekit.config.balance import BiasBalance
from moekit.config.model import GQAConfig, Llama3Config, MLAConfig, ModelConfig, RopeConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.model.transformer import Transformer

HALF = RopeConfig(layout="half")
NORMALISED = TopKRouting(renormalise=True)
V3 = TopKRouting(score="sigmoid", renormalise=True, n_groups=4, top_k_groups=2, group_score="top2_sum")


def experts(routing: TopKRouting, shared: int = 0, **changes: Any) -> MoEConfig:
    return MoEConfig(expert_width=24, n_routed=8, n_shared=shared, top_k=3, routing=routing, **changes)


def gqa(**changes: Any) -> GQAConfig:
    return GQAConfig(**{"n_heads": 4, "n_kv_heads": 2, "head_dim": 16} | changes)


def mla(**changes: Any) -> MLAConfig:
    sizes = {"n_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    return MLAConfig(**sizes | changes)


def small(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "width": 64,
        "n_layers": 3,
        "dense_layers": (),
        "dense_width": 40,
        "attention": gqa(),
        "rope": HALF,
        "max_positions": 128,
    }
    return ModelConfig(**settings | changes)


ALL = (0, 1, 2)

CASES = {
    "llama": small(dense_layers=ALL, attention=gqa(qkv_bias=True, out_bias=True)),
    "llama of experts": small(moe=experts(NORMALISED), tie_embeddings=True),
    "deepseek": small(dense_layers=(0,), moe=experts(TopKRouting(), shared=2)),
    "deepseek2": small(dense_layers=(0,), attention=mla(), moe=experts(TopKRouting(scale=4.0), shared=2)),
    "deepseek2 of groups": small(
        dense_layers=(0, 1),
        attention=mla(q_lora_rank=14),
        moe=experts(V3, shared=1, balance=(BiasBalance(),)),
        tie_embeddings=True,
    ),
    "olmoe": small(attention=gqa(n_kv_heads=4, qk_norm="full"), moe=experts(TopKRouting())),
    "qwen2moe": small(
        attention=gqa(qkv_bias=True), moe=experts(TopKRouting(), shared=1, shared_expert_width=56, shared_gate=True)
    ),
    "qwen3moe": small(attention=gqa(head_dim=24, qk_norm="head"), moe=experts(NORMALISED)),
    "qwen3": small(dense_layers=ALL, attention=gqa(qk_norm="head")),
}
"""By what llama.cpp calls the architecture, and what is special."""

ROTARY_FACTORS = small(dense_layers=ALL, rope=replace(HALF, scaling=Llama3Config()))


def written(config: ModelConfig, path: Path, dtype: DType = "bfloat16") -> Path:
    write_gguf(config, Transformer(config).state_dict().__getitem__, path, dtype, None)
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, start: int = 0) -> bytes:
    """`shape` as the file has it, columns first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, start)


def header(fields: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields + tensors)
