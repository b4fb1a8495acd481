"""OLMoE (arXiv 2409.02060): experts in every layer, queries and keys normed over all heads."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.balance import ExpertLoss, RouterZLoss
from moekit.config.families import attention as heads
from moekit.config.families.balance import balanced, write_balance
from moekit.config.families.experts import read_experts, softmax_then_top_k
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.families.names import EXPERTS, GQA, NORMS, names_of
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import GQAConfig, ModelConfig

PUBLISHED = (ExpertLoss(coefficient=0.01, scope="micro_batch"), RouterZLoss(coefficient=0.001))


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    attention, moe = config.attention, config.moe
    if not isinstance(attention, GQAConfig):
        return None
    return {
        **write_trunk(config, "olmoe", "OlmoeForCausalLM"),
        "intermediate_size": moe.expert_width,
        **heads.write_heads(attention),
        "attention_bias": attention.qkv_bias,
        "clip_qkv": attention.clip_qkv,
        "num_experts": moe.n_routed,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.top_k_routing.renormalise,
        **write_balance(moe),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    trunk = read_trunk(fields)
    bias = fields.get("attention_bias", bool, False)
    attention = heads.read_heads(
        fields,
        heads.equal_share(fields, trunk.width),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        clip_qkv=fields.optional("clip_qkv", float),
    )
    moe = read_experts(fields, "intermediate_size", softmax_then_top_k(fields))
    config = replace(trunk, attention=attention, moe=balanced(fields, moe, PUBLISHED))
    fields.finish()
    return config


FAMILY = Family("olmoe", to_hub, from_hub, names_of(NORMS, GQA, EXPERTS))
