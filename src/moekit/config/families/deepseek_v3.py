"""DeepSeek-V3, R1 and every checkpoint of that architecture (arXiv 2412.19437)."""

from collections.abc import Mapping
from typing import Any

from moekit.config.balance import BiasBalance, SequenceLoss
from moekit.config.codec import to_dict, update
from moekit.config.errors import check
from moekit.config.families.hub import HubFields, write_rope
from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig, TopKRouting

BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.q_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_a.bias": "self_attn.q_a_proj.bias",
    "attention.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_b.weight": "self_attn.q_b_proj.weight",
    "attention.kv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a.bias": "self_attn.kv_a_proj_with_mqa.bias",
    "attention.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.out.bias": "self_attn.o_proj.bias",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.down.weight": "mlp.down_proj.weight",
    "feed_forward.router.centroids": "mlp.gate.weight",
    "feed_forward.balance.bias.selection_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.experts.gate_up": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "feed_forward.experts.down": "mlp.experts.{expert}.down_proj.weight",
    "feed_forward.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "feed_forward.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}
"""Tensors of one block."""

MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

PREDICTION = {
    "mtp.embedding_norm.weight": "enorm.weight",
    "mtp.hidden_norm.weight": "hnorm.weight",
    "mtp.projection.weight": "eh_proj.weight",
    "mtp.norm.weight": "shared_head.norm.weight",
}
"""Tensors of the multi-token prediction module, which stands behind the last layer as one more."""

COPIES = {"embed_tokens.weight": "embedding.weight", "shared_head.head.weight": "head.weight"}
"""Released checkpoints repeat embedding and head in that layer."""


def names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Our tensor names to the hub's."""
    named: dict[str, str | tuple[str, ...]] = dict(MODEL)
    for layer in range(config.n_layers):
        named |= {f"layers.{layer}.{ours}": _inside(layer, hub) for ours, hub in BLOCK.items()}
    if config.mtp_depth:
        last = config.n_layers
        named |= {ours: _inside(last, hub) for ours, hub in PREDICTION.items()}
        named |= {f"mtp.block.{ours}": _inside(last, hub) for ours, hub in BLOCK.items()}
    return named


def copies(config: ModelConfig) -> dict[str, str]:
    """Hub names of tensors that only repeat another, with our name of the original."""
    if not config.mtp_depth:
        return {}
    return {f"model.layers.{config.n_layers}.{hub}": ours for hub, ours in COPIES.items()}


def zeros(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that other readers expect and we lack: a selection bias of 0, and shared experts of no width."""
    moe = config.moe
    if not config.moe_layers:
        return {}
    missing: dict[str, tuple[int, ...]] = {}
    if not any(isinstance(rule, BiasBalance) for rule in moe.balance):
        missing["mlp.gate.e_score_correction_bias"] = (moe.n_routed,)
    if not moe.n_shared:
        missing |= {f"mlp.shared_experts.{part}_proj.weight": (0, config.width) for part in ("gate", "up")}
        missing["mlp.shared_experts.down_proj.weight"] = (config.width, 0)
    layers = [*config.moe_layers, *([config.n_layers] if config.mtp_depth else [])]
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in missing.items()}


def _inside(layer: int, hub: str | tuple[str, ...]) -> str | tuple[str, ...]:
    prefix = f"model.layers.{layer}."
    return prefix + hub if isinstance(hub, str) else tuple(prefix + name for name in hub)


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    attention, moe, rope = config.attention, config.moe, config.rope
    # A group's worth is the sum of its two best experts, so that transformers fails where groups hold but one.
    if not isinstance(attention, MLAConfig) or moe.n_routed // moe.routing.n_groups < 2:
        return None
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.dense_width,
        "moe_intermediate_size": moe.expert_width,
        "num_hidden_layers": config.n_layers,
        "num_nextn_predict_layers": config.mtp_depth,
        "first_k_dense_replace": len(config.dense_layers),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": attention.bias,
        "n_routed_experts": moe.n_routed,
        "n_shared_experts": moe.n_shared,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.routing.n_groups,
        "topk_group": moe.routing.top_k_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": moe.routing.renormalise,
        "routed_scaling_factor": moe.routing.scale,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_interleave": rope.layout == "interleaved",
        "attention_dropout": 0.0,
        **write_rope(rope),
        # What training needs and other readers ignore.
        "moekit": {"balance": to_dict(moe)["balance"]},
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    fields.expect("topk_method", "noaux_tc")
    fields.expect("scoring_func", "sigmoid")
    fields.expect("hidden_act", "silu")
    fields.expect("moe_layer_freq", 1)
    fields.expect("attention_dropout", 0, 0.0)
    fields.asked |= {"head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "moekit"}
    n_heads = fields.get("num_attention_heads", int)
    fields.expect("num_key_value_heads", n_heads)
    why = "the weights are quantised, which is not supported yet"
    check(data.get("quantization_config") is None, "quantization_config", why, "convert them to bfloat16 first")
    fields.asked.add("quantization_config")
    max_positions = fields.get("max_position_embeddings", int)
    n_layers = fields.get("num_hidden_layers", int)
    config = ModelConfig(
        vocab_size=fields.get("vocab_size", int),
        width=fields.get("hidden_size", int),
        n_layers=n_layers,
        dense_layers=tuple(range(min(fields.get("first_k_dense_replace", int, 0), n_layers))),
        dense_width=fields.get("intermediate_size", int),
        attention=MLAConfig(
            n_heads=n_heads,
            q_lora_rank=fields.optional("q_lora_rank", int),
            kv_lora_rank=fields.get("kv_lora_rank", int),
            qk_nope_head_dim=fields.get("qk_nope_head_dim", int),
            qk_rope_head_dim=fields.get("qk_rope_head_dim", int),
            v_head_dim=fields.get("v_head_dim", int),
            bias=fields.get("attention_bias", bool, False),
        ),
        rope=fields.rope("interleaved" if fields.get("rope_interleave", bool, True) else "half", max_positions),
        moe=_moe(fields),
        mtp_depth=fields.get("num_nextn_predict_layers", int, 0),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        norm_epsilon=fields.get("rms_norm_eps", float),
        max_positions=max_positions,
        init_std=fields.get("initializer_range", float, 0.02),
    )
    fields.finish()
    return config


def _moe(fields: HubFields) -> MoEConfig:
    n_routed, top_k = fields.get("n_routed_experts", int), fields.get("num_experts_per_tok", int)
    # The balance of arXiv 2412.19437, section 4.2, which released files leave out.
    published = MoEConfig(balance=(BiasBalance(rate=0.001), SequenceLoss(coefficient=0.0001)))
    own = fields.data.get("moekit")
    check(own is None or (isinstance(own, dict) and own.keys() <= {"balance"}), "moekit", "may hold `balance` alone")
    balance = update(MoEConfig(n_routed=n_routed, top_k=top_k), own).balance if own else published.balance
    return MoEConfig(
        expert_width=fields.get("moe_intermediate_size", int),
        n_routed=n_routed,
        n_shared=fields.get("n_shared_experts", int, 0),
        top_k=top_k,
        routing=TopKRouting(
            score="sigmoid",
            renormalise=fields.get("norm_topk_prob", bool, True),
            epsilon=1e-20,
            scale=fields.get("routed_scaling_factor", float, 1.0),
            n_groups=fields.get("n_group", int, 1),
            top_k_groups=fields.get("topk_group", int, 1),
            group_score="top2_sum",
        ),
        balance=balance,
    )
