"""Models without experts: Llama, Qwen2 and Qwen3 differ in biases, norms and the width of a head."""

from dataclasses import replace
from typing import Any

from moekit.config.families.attention import read_heads, write_heads
from moekit.config.families.hub import HubFields
from moekit.config.families.names import DENSE, GQA, NORMS, names_of
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import GQAConfig, ModelConfig

NAMES = names_of(NORMS, GQA, DENSE)


def write_dense(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any] | None:
    """The fields all three know, or None for a model with experts or latent attention."""
    attention = config.attention
    if not isinstance(attention, GQAConfig) or config.moe_layers:
        return None
    return {
        **write_trunk(config, model_type, architecture),
        **write_heads(attention),
        "head_dim": attention.head_dim,
    }


def read_dense(fields: HubFields, head_dim: int | None = None, **settings: Any) -> ModelConfig:
    """The model, once all fields are read; `head_dim` is the family's, or None where heads share the width out."""
    trunk = read_trunk(fields)
    share = trunk.width // fields.positive("num_attention_heads")
    config = replace(
        trunk,
        dense_layers=tuple(range(trunk.n_layers)),
        attention=read_heads(fields, head_dim or share, **settings),
    )
    fields.finish()
    return config
