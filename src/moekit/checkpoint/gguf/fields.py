"""The keys of a GGUF file that describe the model."""

from typing import Any

from moekit.checkpoint.gguf.architecture import Architecture, normalised
from moekit.checkpoint.gguf.positions import scaling_fields
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig

SOFTMAX, SIGMOID = 1, 2
"""expert_gating_func"""


def model_fields(config: ModelConfig, chosen: Architecture) -> dict[str, Any]:
    """Shape, positions and routing, keyed as llama.cpp reads them. Whole numbers are uint32, others float32."""
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "block_count": config.n_layers,
        "feed_forward_length": config.moe.expert_width if chosen.experts == "all" else config.dense_width,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "rope.freq_base": float(config.rope.theta),
        **_attention(config),
        **scaling_fields(config),
        **(_experts(config.moe, chosen) if config.moe_layers else {}),
    }
    if chosen.experts == "after_dense":
        fields |= _dense_first(config)
    return {f"{chosen.name}.{key}": value for key, value in fields.items()}


def _attention(config: ModelConfig) -> dict[str, Any]:
    attention = config.attention
    if isinstance(attention, GQAConfig):
        return {
            "attention.head_count": attention.n_heads,
            "attention.head_count_kv": attention.n_kv_heads,
            "attention.key_length": attention.head_dim,
            "attention.value_length": attention.head_dim,
            "rope.dimension_count": attention.head_dim,
        }
    return _latent_attention(attention)


def _latent_attention(attention: MLAConfig) -> dict[str, Any]:
    """Absorbed, MLA is attention with one key-value head as wide as the latent and the rotary key."""
    return {
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.q_lora_rank or 0,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.kv_lora_rank + attention.qk_rope_head_dim,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_nope_head_dim + attention.qk_rope_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "rope.dimension_count": attention.qk_rope_head_dim,
    }


def _experts(moe: MoEConfig, chosen: Architecture) -> dict[str, Any]:
    routing = moe.top_k_routing
    fields: dict[str, Any] = {"expert_count": moe.n_routed, "expert_used_count": moe.top_k}
    fields["expert_feed_forward_length"] = moe.expert_width
    if routing.top_k_groups < routing.n_groups:
        fields |= {"expert_group_count": routing.n_groups, "expert_group_used_count": routing.top_k_groups}
    if chosen.shared == "gated":
        fields["expert_shared_feed_forward_length"] = moe.shared_width
    if chosen.scaled:
        fields["expert_weights_scale"] = float(routing.scale)
    if chosen.steered:
        fields["expert_gating_func"] = SIGMOID if routing.score == "sigmoid" else SOFTMAX
        fields["expert_weights_norm"] = normalised(moe)
    return fields


def _dense_first(config: ModelConfig) -> dict[str, Any]:
    """What llama.cpp's DeepSeek architectures want even where no layer has experts."""
    return {
        "leading_dense_block_count": len(config.dense_layers),
        "expert_feed_forward_length": config.moe.expert_width,
        "expert_shared_count": max(config.moe.shared_width // config.moe.expert_width, 1),
    }
