"""Qwen2 and Qwen2.5 (arXiv 2407.10671): dense, biases on queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from moekit.config.families.attention import refuse_windows
from moekit.config.families.dense import NAMES, read_dense, write_dense
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.model import ModelConfig


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    written = write_dense(config, "qwen2", "Qwen2ForCausalLM")
    return written and written | {"use_sliding_window": False}


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    refuse_windows(fields)
    return read_dense(fields, qkv_bias=True)


FAMILY = Family("qwen2", to_hub, from_hub, NAMES)
