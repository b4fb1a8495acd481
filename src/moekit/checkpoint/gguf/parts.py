"""llama.cpp's tensors: their names, and how each is cut from one of ours."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from moekit.checkpoint.gguf.architecture import Architecture
from moekit.checkpoint.gguf.positions import FACTORS, Layout, rope_factors, turn_last_rows, turn_rows
from moekit.config.model import GQAConfig, Llama3Config, MLAConfig, ModelConfig
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor

Cut = Callable[[Tensor], tuple[Tensor, ...]]

MODEL = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}

BLOCK = {
    "attention_norm.weight": ("attn_norm.weight",),
    "attention.q.weight": ("attn_q.weight",),
    "attention.k.weight": ("attn_k.weight",),
    "attention.v.weight": ("attn_v.weight",),
    "attention.q.bias": ("attn_q.bias",),
    "attention.k.bias": ("attn_k.bias",),
    "attention.v.bias": ("attn_v.bias",),
    "attention.q_norm.weight": ("attn_q_norm.weight",),
    "attention.k_norm.weight": ("attn_k_norm.weight",),
    "attention.q_a.weight": ("attn_q_a.weight",),
    "attention.q_a_norm.weight": ("attn_q_a_norm.weight",),
    "attention.q_b.weight": ("attn_q_b.weight",),
    "attention.kv_a.weight": ("attn_kv_a_mqa.weight",),
    "attention.kv_a_norm.weight": ("attn_kv_a_norm.weight",),
    "attention.kv_b.weight": ("attn_k_b.weight", "attn_v_b.weight"),
    "attention.out.weight": ("attn_output.weight",),
    "attention.out.bias": ("attn_output.bias",),
    "feed_forward_norm.weight": ("ffn_norm.weight",),
    "feed_forward.gate_up.weight": ("ffn_gate.weight", "ffn_up.weight"),
    "feed_forward.down.weight": ("ffn_down.weight",),
    "feed_forward.router.centroids": ("ffn_gate_inp.weight",),
    "feed_forward.balance.bias.selection_bias": ("exp_probs_b.bias",),
    "feed_forward.experts.gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "feed_forward.experts.down": ("ffn_down_exps.weight",),
    "feed_forward.shared.gate_up.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "feed_forward.shared.down.weight": ("ffn_down_shexp.weight",),
    "feed_forward.shared_gate.weight": ("ffn_gate_inp_shexp.weight",),
}
"""Tensors of one block; several names share one of ours."""

SILENT = {
    "feed_forward.experts.gate_up": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "feed_forward.experts.down": ("ffn_down_shexp.weight",),
}
"""Where an architecture cannot do without a shared expert: one of zeros, of the shape of a routed one."""


class Part(NamedTuple):
    """Tensors `names` of the file, which `cut` makes out of our tensor `ours`."""

    ours: str
    names: tuple[str, ...]
    cut: Cut


def parts(config: ModelConfig, chosen: Architecture) -> Iterator[tuple[Part, tuple[Tensor, ...]]]:
    """Every part of the file in its order, with its tensors' shapes as tensors without memory."""
    with torch.device("meta"):
        state = Transformer(replace(config, mtp_depth=0)).state_dict()
    if config.tie_embeddings:
        del state["head.weight"]
    for ours, empty in state.items():
        part = _of_block(ours, config, chosen) if ours.startswith("layers.") else _of_model(ours, config, chosen)
        yield part, part.cut(empty)


def _of_model(ours: str, config: ModelConfig, chosen: Architecture) -> Part:
    if ours == "embedding.weight" and config.tie_embeddings and chosen.own_head:
        return Part(ours, (MODEL[ours], MODEL["head.weight"]), lambda tensor: (tensor, tensor))
    attention = config.attention
    if ours == "norm.weight" and isinstance(config.rope.scaling, Llama3Config) and isinstance(attention, GQAConfig):
        factors = rope_factors(config.rope, attention.head_dim)
        return Part(ours, (MODEL[ours], FACTORS), lambda tensor: (tensor, factors))
    return Part(ours, (MODEL[ours],), _whole)


def _of_block(ours: str, config: ModelConfig, chosen: Architecture) -> Part:
    _, layer, inside = ours.split(".", 2)
    names, cut = BLOCK[inside], _cut(inside, config, chosen)
    if inside in SILENT and chosen.shared == "plain" and not config.moe.n_shared:
        names, cut = names + SILENT[inside], partial(_with_silence, cut)
    return Part(ours, tuple(f"blk.{layer}.{name}" for name in names), cut)


def _cut(inside: str, config: ModelConfig, chosen: Architecture) -> Cut:
    if "gate_up" in inside:
        return lambda tensor: tensor.chunk(2, dim=-2)
    if inside == "feed_forward.shared_gate.weight":
        return lambda tensor: (tensor.squeeze(0),)
    if isinstance(config.attention, MLAConfig):
        return _cut_latent(inside, config.attention, config.rope.layout, chosen.layout)
    if inside.split(".")[1] in ("q", "k", "q_norm", "k_norm"):
        return partial(_turned, head=config.attention.head_dim, ours=config.rope.layout, theirs=chosen.layout)
    return _whole


def _cut_latent(inside: str, attention: MLAConfig, ours: Layout, theirs: Layout) -> Cut:
    rotary, head = attention.qk_rope_head_dim, attention.qk_nope_head_dim + attention.qk_rope_head_dim
    if inside in ("attention.q.weight", "attention.q_b.weight"):
        return lambda tensor: (turn_last_rows(tensor, head, rotary, ours, theirs),)
    if inside == "attention.kv_a.weight":
        return lambda tensor: (turn_last_rows(tensor, tensor.shape[0], rotary, ours, theirs),)
    if inside == "attention.kv_b.weight":
        return partial(_keys_and_values, attention=attention)
    return _whole


def _turned(tensor: Tensor, head: int, ours: Layout, theirs: Layout) -> tuple[Tensor, ...]:
    return (turn_rows(tensor, head, ours, theirs),)


def _whole(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _keys_and_values(tensor: Tensor, attention: MLAConfig) -> tuple[Tensor, ...]:
    """W_UK of each head, transposed as it is absorbed into the query, and W_UV (arXiv 2405.04434, section 2.1.2)."""
    heads = tensor.unflatten(0, (attention.n_heads, -1))
    keys, values = heads.split([attention.qk_nope_head_dim, attention.v_head_dim], dim=1)
    return keys.transpose(1, 2), values


def _with_silence(cut: Cut, tensor: Tensor) -> tuple[Tensor, ...]:
    routed = cut(tensor)
    return routed + tuple(torch.zeros_like(experts[0]) for experts in routed)
