"""A GGUF file in Q4_0 with random weights, of the architecture of DeepSeek-MoE-16B: something for llama.cpp to run."""

from pathlib import Path
from typing import Any

import numpy as np

from moekit.config.model import GQAConfig, ModelConfig

TILE = 256
"""Rows that are drawn; a matrix repeats them."""


def write_random_gguf(config: ModelConfig, path: Path) -> None:
    """All matrices in Q4_0, the router and norms in float32; there is no vocabulary."""
    import gguf  # noqa: PLC0415 - optional

    writer = gguf.GGUFWriter(path, "deepseek")
    _write_fields(writer, config)
    q4, f32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        numbers = rng.standard_normal((TILE, shape[-1]), dtype=np.float32) * shape[-1] ** -0.5
        tile = gguf.quants.quantize(numbers, q4)
        rows = int(np.prod(shape[:-1]))
        return np.tile(tile, (-(-rows // TILE), 1))[:rows].reshape(*shape[:-1], tile.shape[-1])

    made: dict[tuple[int, ...], np.ndarray] = {}
    for name, shape in _matrices(config):
        if shape not in made:
            made[shape] = drawn(*shape)
        writer.add_tensor(f"{name}.weight", made[shape], raw_dtype=q4)
    for name, shape in _plain(config):
        numbers = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * shape[-1] ** -0.5
        writer.add_tensor(f"{name}.weight", numbers.astype(np.float32), raw_dtype=f32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_fields(writer: Any, config: ModelConfig) -> None:
    attention, moe = config.attention, config.moe
    assert isinstance(attention, GQAConfig)
    assert config.dense_layers == (0,)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.dense_width)
    writer.add_head_count(attention.n_heads)
    writer.add_head_count_kv(attention.n_kv_heads)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_expert_count(moe.n_routed)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_shared_count(moe.n_shared)
    writer.add_expert_feed_forward_length(moe.expert_width)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_weights_scale(1.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def _matrices(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    width, moe, attention = config.width, config.moe, config.attention
    assert isinstance(attention, GQAConfig)
    heads, kv_heads = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    found: list[tuple[str, tuple[int, ...]]] = [(name, (config.vocab_size, width)) for name in ("token_embd", "output")]
    for layer in range(config.n_layers):
        sizes = {"attn_q": (heads, width), "attn_k": (kv_heads, width), "attn_v": (kv_heads, width)}
        sizes["attn_output"] = (width, heads)
        if layer in config.dense_layers:
            kinds = {"": (config.dense_width,)}
        else:
            kinds = {"_exps": (moe.n_routed, moe.expert_width), "_shexp": (moe.shared_width,)}
        for suffix, inner in kinds.items():
            sizes |= {f"ffn_{name}{suffix}": (*inner, width) for name in ("gate", "up")}
            sizes[f"ffn_down{suffix}"] = (*inner[:-1], width, inner[-1])
        found += [(f"blk.{layer}.{name}", shape) for name, shape in sizes.items()]
    return found


def _plain(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    layers = range(config.n_layers)
    found: list[tuple[str, tuple[int, ...]]] = [("output_norm", (config.width,))]
    found += [(f"blk.{layer}.{name}_norm", (config.width,)) for layer in layers for name in ("attn", "ffn")]
    sparse = [layer for layer in layers if layer not in config.dense_layers]
    return [*found, *((f"blk.{layer}.ffn_gate_inp", (config.moe.n_routed, config.width)) for layer in sparse)]
