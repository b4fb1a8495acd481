"""The shapes that are measured, and what their products come to."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from moekit.config.balance import BiasBalance
from moekit.config.families import deepseek_v3
from moekit.config.model import GQAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.presets.load import load_run

HubFields = Mapping[str, Any]

MATRICES = 3
"""Of an expert: gate, up and down."""

DIRECTIONS = 3
"""Products of a training step for each of the forward pass: itself, and the gradients of its two factors."""


class LayerShape(NamedTuple):
    """A mixture-of-experts layer and the tokens that come to it at once."""

    width: int
    expert_width: int
    n_routed: int
    top_k: int
    n_shared: int
    tokens: int

    @property
    def active_weights(self) -> int:
        """Weights of the experts that one token meets; the router's are left out."""
        return MATRICES * self.width * self.expert_width * (self.top_k + self.n_shared)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the experts' products, forward."""
        return 2 * self.active_weights * self.tokens

    def words(self) -> str:
        """For readers."""
        return (
            f"d {self.width}, {self.n_routed} experts of {self.expert_width}, top-{self.top_k} + {self.n_shared} "
            f"shared, {self.tokens} token{'s' * (self.tokens != 1)}"
        )


class Sizes(NamedTuple):
    """All shapes of a benchmark. `model` is a `config.json` of the family `deepseek_v3`, trained on `batch` sequences
    of `length` tokens; `deep` is decoded in 4 bits, after a prompt of `prompt` tokens."""

    trained: LayerShape
    large: LayerShape
    granular: tuple[LayerShape, ...]
    model: HubFields
    batch: int
    length: int
    deep: ModelConfig
    prompt: int
    side: int
    read_bytes: int
    rotate_bytes: int


MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
"""146 million parameters."""

GRANULAR = ((8, 1, 1536), (16, 2, 768), (32, 4, 384), (64, 8, 192), (128, 8, 192), (256, 12, 128), (512, 16, 96))
"""Experts, experts of a token, width of one: a token always meets 1536 inner numbers. It meets 1/8 of the experts up to
64 of them, then 1/16, 1/21 and 1/32: in released models, too, that share falls as experts grow in number."""


def full_sizes() -> Sizes:
    """What is published."""
    deep = replace(load_run("deepseek-moe-16b").model, n_layers=8)
    return Sizes(
        trained=LayerShape(512, 256, 64, 6, 2, 4096),
        large=LayerShape(2048, 1408, 64, 6, 2, 512),
        granular=tuple(LayerShape(512, each, n, k, 0, 4096) for n, k, each in GRANULAR),
        model=MappingProxyType(MODEL),
        batch=8,
        length=512,
        deep=deep,
        prompt=512,
        side=2048,
        read_bytes=1 << 30,
        rotate_bytes=1 << 29,
    )


def quick_sizes() -> Sizes:
    """The same works in seconds, to see that they run; their figures mean nothing."""
    less = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    fewer = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8}
    deep = load_run("deepseek-moe-16b").model
    attention = GQAConfig(n_heads=2, n_kv_heads=2, head_dim=32)
    moe = replace(deep.moe, expert_width=64, n_routed=8, top_k=2)
    sizes = {"vocab_size": 256, "width": 64, "n_layers": 2, "dense_width": 128}
    return Sizes(
        trained=LayerShape(64, 32, 8, 2, 2, 128),
        large=LayerShape(128, 64, 8, 2, 2, 16),
        granular=(LayerShape(64, 96, 8, 1, 0, 64), LayerShape(64, 48, 16, 2, 0, 64)),
        model=MappingProxyType({**MODEL, **less, **fewer, "num_experts_per_tok": 2}),
        batch=2,
        length=16,
        deep=replace(deep, **sizes, attention=attention, moe=moe),
        prompt=16,
        side=128,
        read_bytes=1 << 22,
        rotate_bytes=0,
    )


def layer_config(shape: LayerShape) -> MoEConfig:
    """The layer as DeepSeek-V3 has it: sigmoid scores, a bias for the choice, renormalised and scaled weights."""
    fields = {
        "hidden_size": shape.width,
        "moe_intermediate_size": shape.expert_width,
        "n_routed_experts": shape.n_routed,
        "num_experts_per_tok": shape.top_k,
        "n_shared_experts": shape.n_shared,
    }
    return replace(model_config({**MODEL, **fields}).moe, width=shape.width)


def model_config(fields: HubFields) -> ModelConfig:
    """The model that a `config.json` describes, balanced by its bias alone: others compute no balance loss."""
    config = deepseek_v3.from_hub(fields)
    return replace(config, moe=replace(config.moe, balance=(BiasBalance(),)))
