"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and dense models that took over its architecture."""

from collections.abc import Mapping
from typing import Any

from moekit.config.families.dense import NAMES, read_dense, write_dense
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.model import GQAConfig, ModelConfig


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    written, attention = write_dense(config, "llama", "LlamaForCausalLM"), config.attention
    # transformers wants heads that divide the width, whatever their own.
    if written is None or not isinstance(attention, GQAConfig) or config.width % attention.n_heads:
        return None
    return written | {"attention_bias": attention.qkv_bias, "mlp_bias": False}


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    fields.expect("mlp_bias", False)
    bias = fields.get("attention_bias", bool, False)
    return read_dense(fields, qkv_bias=bias, out_bias=bias)


FAMILY = Family("llama", to_hub, from_hub, NAMES)
