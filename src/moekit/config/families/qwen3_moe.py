"""Qwen3-MoE (arXiv 2505.09388): queries and keys normed head by head, no shared experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.families.attention import n_heads_of, read_heads, write_heads
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.families.names import DENSE, EXPERTS, GQA, NORMS, names_of
from moekit.config.families.qwen_moe import read_mixture, write_mixture
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import GQAConfig, ModelConfig


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    attention = config.attention
    if not isinstance(attention, GQAConfig):
        return None
    return {
        **write_trunk(config, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **write_heads(attention),
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        **write_mixture(config),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    trunk = read_trunk(fields)
    head_dim, bias = trunk.width // n_heads_of(fields), fields.get("attention_bias", bool, False)
    config = replace(
        trunk,
        attention=read_heads(fields, head_dim, qkv_bias=bias, out_bias=bias, qk_norm="head"),
        **read_mixture(fields, trunk.n_layers),
    )
    fields.finish()
    return config


FAMILY = Family("qwen3_moe", to_hub, from_hub, names_of(NORMS, GQA, DENSE, EXPERTS))
