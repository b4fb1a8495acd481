"""Attention in `config.json`: grouped-query heads and latent attention, and windows, which moekit lacks."""

from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.config.model import GQAConfig, MLAConfig


def read_heads(fields: HubFields, head_dim: int, **settings: Any) -> GQAConfig:
    """Grouped-query attention; `head_dim` is the family's where the file has none, the settings are those of its class.

    Where the file has no number of key and value heads, every head has its own.
    """
    n_heads = n_heads_of(fields)
    return GQAConfig(
        n_heads=n_heads,
        n_kv_heads=fields.get("num_key_value_heads", int, n_heads),
        head_dim=fields.get("head_dim", int, head_dim),
        **settings,
    )


def n_heads_of(fields: HubFields) -> int:
    """The number of query heads."""
    return fields.positive("num_attention_heads")


def equal_share(fields: HubFields, width: int) -> int:
    """The width of a head in families whose heads share the model's width out; another `head_dim` is refused."""
    n_heads = n_heads_of(fields)
    check(width % n_heads == 0, "num_attention_heads", f"{n_heads} does not divide hidden_size = {width}")
    fields.expect("head_dim", width // n_heads)
    return width // n_heads


def write_heads(attention: GQAConfig) -> dict[str, Any]:
    """The fields `read_heads` reads, but for the width of a head."""
    return {"num_attention_heads": attention.n_heads, "num_key_value_heads": attention.n_kv_heads}


def read_latent(fields: HubFields) -> MLAConfig:
    """Multi-head latent attention."""
    # Other readers derive these two from the widths below.
    fields.ignore("head_dim", "qk_head_dim")
    n_heads = n_heads_of(fields)
    fields.expect("num_key_value_heads", n_heads)
    return MLAConfig(
        n_heads=n_heads,
        q_lora_rank=fields.optional("q_lora_rank", int),
        kv_lora_rank=fields.get("kv_lora_rank", int),
        qk_nope_head_dim=fields.get("qk_nope_head_dim", int),
        qk_rope_head_dim=fields.get("qk_rope_head_dim", int),
        v_head_dim=fields.get("v_head_dim", int),
        bias=fields.get("attention_bias", bool, False),
    )


def write_latent(attention: MLAConfig) -> dict[str, Any]:
    """The fields `read_latent` reads."""
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": attention.bias,
    }


def refuse_windows(fields: HubFields) -> None:
    """Raise a ConfigError where a Qwen model would see only the last tokens. Sizes of windows not used are ignored."""
    fields.ignore("sliding_window", "max_window_layers")
    hint = "moekit has full attention alone"
    check(not fields.get("use_sliding_window", bool, False), "use_sliding_window", "is not supported", hint)
    kinds = fields.get("layer_types", list, [])
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    check(other is None, "layer_types", f"{other!r} is not supported", hint)
