"""What Qwen's mixtures share: which layers have experts, how these are chosen and balanced."""

from typing import Any

from moekit.config.balance import ExpertLoss
from moekit.config.families.attention import refuse_windows
from moekit.config.families.balance import balanced, write_balance
from moekit.config.families.experts import n_experts_of, read_experts, softmax_then_top_k
from moekit.config.families.hub import HubFields
from moekit.config.families.layers import read_listed_dense, write_listed_dense
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig

PUBLISHED = (ExpertLoss(coefficient=0.001, scope="micro_batch"),)


def read_mixture(fields: HubFields, n_layers: int, **shared: Any) -> dict[str, Any]:
    """The fields of ModelConfig that say which layers have experts, and which experts. Without any, all are dense."""
    refuse_windows(fields)
    dense_layers = read_listed_dense(fields, n_layers)
    if n_experts_of(fields) == 0:
        fields.ignore("moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "moekit")
        return {"dense_layers": tuple(range(n_layers)), "moe": MoEConfig()}
    moe = read_experts(fields, "moe_intermediate_size", softmax_then_top_k(fields), **shared)
    return {"dense_layers": dense_layers, "moe": balanced(fields, moe, PUBLISHED)}


def write_mixture(config: ModelConfig) -> dict[str, Any]:
    """The fields `read_mixture` reads."""
    moe = config.moe
    return {
        "use_sliding_window": False,
        **write_listed_dense(config),
        "moe_intermediate_size": moe.expert_width,
        "num_experts": moe.n_routed,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.top_k_routing.renormalise,
        **write_balance(moe),
    }
