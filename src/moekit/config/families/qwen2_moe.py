"""Qwen1.5-MoE and Qwen2-MoE: a shared expert of its own width behind a sigmoid gate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.families.attention import n_heads_of, read_heads, write_heads
from moekit.config.families.family import Family, Names
from moekit.config.families.hub import HubFields
from moekit.config.families.names import DENSE, EXPERTS, GQA, NORMS, hollow, in_layers, names_of
from moekit.config.families.qwen_moe import read_mixture, write_mixture
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import GQAConfig, ModelConfig

GATE = "mlp.shared_expert_gate.weight"
SHARED_EXPERT: Names = {
    "feed_forward.shared.gate_up.weight": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "feed_forward.shared.down.weight": "mlp.shared_expert.down_proj.weight",
    "feed_forward.shared_gate.weight": GATE,
}


def zeros(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """transformers builds a shared expert of no width, and its gate, even where there is none."""
    if config.moe.n_shared:
        return {}
    return in_layers(config.moe_layers, hollow(config, "mlp.shared_expert") | {GATE: (1, config.width)})


def idle(config: ModelConfig) -> frozenset[str]:
    """The gate of a shared expert of no width has no effect."""
    return frozenset(name for name in zeros(config) if name.endswith(GATE))


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    attention = config.attention
    if not isinstance(attention, GQAConfig):
        return None
    return {
        **write_trunk(config, "qwen2_moe", "Qwen2MoeForCausalLM"),
        **write_heads(attention),
        "head_dim": attention.head_dim,
        "qkv_bias": attention.qkv_bias,
        "shared_expert_intermediate_size": config.moe.shared_width,
        **write_mixture(config),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    trunk = read_trunk(fields)
    config = replace(
        trunk,
        attention=read_heads(fields, trunk.width // n_heads_of(fields), qkv_bias=fields.get("qkv_bias", bool, True)),
        **read_mixture(fields, trunk.n_layers, **_shared(fields)),
    )
    fields.finish()
    return config


def _shared(fields: HubFields) -> dict[str, Any]:
    """As many shared experts of the usual width as the block is wide, else one of its own width."""
    width = fields.get("shared_expert_intermediate_size", int)
    count, rest = divmod(width, fields.get("moe_intermediate_size", int) or 1)
    if rest:
        return {"n_shared": 1, "shared_expert_width": width, "shared_gate": True}
    return {"n_shared": count, "shared_gate": count > 0}


FAMILY = Family(
    "qwen2_moe", to_hub, from_hub, names_of(NORMS, GQA, DENSE, EXPERTS, SHARED_EXPERT), zeros=zeros, idle=idle
)
