"""DeepSeek-V3, R1 and every checkpoint of that architecture (arXiv 2412.19437)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.balance import BiasBalance, SequenceLoss
from moekit.config.errors import check
from moekit.config.families.attention import read_latent, write_latent
from moekit.config.families.balance import balanced, write_balance
from moekit.config.families.experts import read_routed_experts, write_routed_experts
from moekit.config.families.family import Family, Names
from moekit.config.families.hub import HubFields
from moekit.config.families.layers import read_first_dense, write_first_dense
from moekit.config.families.names import (
    DENSE,
    EXPERTS,
    MLA,
    NORMS,
    SHARED_EXPERTS,
    hollow,
    in_layer,
    in_layers,
    names_of,
)
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.routing import TopKRouting

BIAS = "mlp.gate.e_score_correction_bias"
BLOCK: Names = {
    **NORMS,
    **MLA,
    **DENSE,
    **EXPERTS,
    **SHARED_EXPERTS,
    "feed_forward.balance.bias.selection_bias": BIAS,
}
LAYERS = names_of(BLOCK)

PREDICTION: Names = {
    "mtp.embedding_norm.weight": "enorm.weight",
    "mtp.hidden_norm.weight": "hnorm.weight",
    "mtp.projection.weight": "eh_proj.weight",
    "mtp.norm.weight": "shared_head.norm.weight",
}
"""Tensors of the multi-token prediction module, which stands behind the last layer as one more."""

COPIES = {"embed_tokens.weight": "embedding.weight", "shared_head.head.weight": "head.weight"}
"""Released checkpoints repeat embedding and head in that layer."""

PUBLISHED = (BiasBalance(rate=0.001), SequenceLoss(coefficient=0.0001))
"""The balance of section 4.2 of the paper, which released files leave out."""


def names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Our tensor names to the hub's."""
    named = LAYERS(config)
    if config.mtp_depth:
        last = config.n_layers
        named |= in_layer(last, PREDICTION, "") | in_layer(last, BLOCK, "mtp.block.")
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
        missing[BIAS] = (moe.n_routed,)
    if not moe.n_shared:
        missing |= hollow(config, "mlp.shared_experts")
    return in_layers((*config.moe_layers, *([config.n_layers] if config.mtp_depth else [])), missing)


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`, or transformers reads others into them."""
    attention, moe, layers = config.attention, config.moe, write_first_dense(config)
    # A group's worth is the sum of its two best experts, so that transformers fails where groups hold but one. It
    # ignores moe_layer_freq.
    followed = moe.n_routed // moe.top_k_routing.n_groups > 1 and layers["moe_layer_freq"] == 1
    if not isinstance(attention, MLAConfig) or not followed:
        return None
    return {
        **write_trunk(config, "deepseek_v3", "DeepseekV3ForCausalLM"),
        **write_latent(attention),
        "rope_interleave": config.rope.layout == "interleaved",
        "num_nextn_predict_layers": config.mtp_depth,
        **layers,
        **write_routed_experts(moe),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": moe.top_k_routing.n_groups,
        "topk_group": moe.top_k_routing.top_k_groups,
        "routed_scaling_factor": moe.top_k_routing.scale,
        **write_balance(moe),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    # The released value of these two is not the published one.
    fields.ignore("aux_loss_alpha", "seq_aux")
    interleaved = fields.get("rope_interleave", bool, True)
    trunk = read_trunk(fields, "interleaved" if interleaved else "half", latent=True)
    depth = fields.get("num_nextn_predict_layers", int, 0)
    check(depth in (0, 1), "num_nextn_predict_layers", f"{depth} prediction modules are not supported, 0 or 1 are")
    config = replace(
        trunk,
        dense_layers=read_first_dense(fields, trunk.n_layers),
        attention=read_latent(fields),
        moe=balanced(fields, read_routed_experts(fields, _routing(fields)), PUBLISHED, biased=True),
        mtp_depth=depth,
    )
    fields.finish()
    return config


def _routing(fields: HubFields) -> TopKRouting:
    return TopKRouting(
        score="sigmoid",
        renormalise=fields.get("norm_topk_prob", bool, True),
        epsilon=1e-20,
        scale=fields.get("routed_scaling_factor", float, 1.0),
        n_groups=fields.get("n_group", int, 1),
        top_k_groups=fields.get("topk_group", int, 1),
        group_score="top2_sum",
    )


FAMILY = Family("deepseek_v3", to_hub, from_hub, names, copies, zeros)
