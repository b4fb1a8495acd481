"""Qwen3 (arXiv 2505.09388): dense, queries and keys normed head by head."""

from collections.abc import Mapping
from typing import Any

from moekit.config.families.attention import refuse_windows
from moekit.config.families.dense import NAMES, read_dense, write_dense
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.model import GQAConfig, ModelConfig

HEAD_DIM = 128
"""The width of a head where the file has none."""


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    written, attention = write_dense(config, "qwen3", "Qwen3ForCausalLM"), config.attention
    if written is None or not isinstance(attention, GQAConfig):
        return None
    return written | {"attention_bias": attention.qkv_bias, "use_sliding_window": False}


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    refuse_windows(fields)
    bias = fields.get("attention_bias", bool, False)
    return read_dense(fields, HEAD_DIM, qkv_bias=bias, out_bias=bias, qk_norm="head")


FAMILY = Family("qwen3", to_hub, from_hub, NAMES)
