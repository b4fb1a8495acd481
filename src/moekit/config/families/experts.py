"""Experts in `config.json`: DeepSeek's fields, and those of Mixtral, OLMoE and Qwen."""

from typing import Any

from moekit.config.families.hub import HubFields
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting


def read_routed_experts(fields: HubFields, routing: TopKRouting) -> MoEConfig:
    """DeepSeek: routed and shared experts of one width."""
    return MoEConfig(
        expert_width=fields.get("moe_intermediate_size", int),
        n_routed=fields.get("n_routed_experts", int),
        n_shared=fields.get("n_shared_experts", int, 0),
        top_k=fields.get("num_experts_per_tok", int),
        routing=routing,
    )


def write_routed_experts(moe: MoEConfig) -> dict[str, Any]:
    """The fields `read_routed_experts` reads."""
    return {
        "moe_intermediate_size": moe.expert_width,
        "n_routed_experts": moe.n_routed,
        "n_shared_experts": moe.shared_width // moe.expert_width,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.top_k_routing.renormalise,
    }


def renormalised(fields: HubFields) -> bool:
    """DeepSeek V1 and V2 divide the weights by their sum where there are several."""
    return fields.get("norm_topk_prob", bool, False) and fields.get("num_experts_per_tok", int) > 1


def n_experts_of(fields: HubFields) -> int:
    """The number of experts, which transformers writes under either of two names."""
    return fields.either("num_experts", "num_local_experts", int)


def read_experts(fields: HubFields, width_key: str, routing: TopKRouting, **shared: Any) -> MoEConfig:
    """Mixtral, OLMoE and Qwen; `width_key` names the width of an expert, `shared` describes the shared ones."""
    described: dict[str, Any] = {"n_shared": 0, **shared}
    return MoEConfig(
        expert_width=fields.get(width_key, int),
        n_routed=n_experts_of(fields),
        top_k=fields.get("num_experts_per_tok", int),
        routing=routing,
        **described,
    )


def softmax_then_top_k(fields: HubFields) -> TopKRouting:
    """OLMoE and Qwen: softmax over all experts; the weights of the chosen are divided by their sum or not."""
    return TopKRouting(renormalise=fields.get("norm_topk_prob", bool, False))
