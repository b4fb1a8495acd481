"""DeepSeekMoE-16B (arXiv 2401.06066), the first of its line."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.families import attention as heads
from moekit.config.families.balance import balanced, read_expert_loss, write_balance, write_expert_loss
from moekit.config.families.experts import read_routed_experts, renormalised, write_routed_experts
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.families.layers import read_first_dense, write_first_dense
from moekit.config.families.names import DENSE, EXPERTS, GQA, NORMS, SHARED_EXPERTS, names_of
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import GQAConfig, ModelConfig
from moekit.config.routing import TopKRouting


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    attention, moe = config.attention, config.moe
    if not isinstance(attention, GQAConfig):
        return None
    return {
        **write_trunk(config, "deepseek", "DeepseekForCausalLM"),
        **heads.write_heads(attention),
        "attention_bias": attention.qkv_bias,
        **write_first_dense(config),
        **write_routed_experts(moe),
        # The released code builds shared experts of no width where this is 0.
        "n_shared_experts": moe.shared_width // moe.expert_width or None,
        "scoring_func": "softmax",
        **write_expert_loss(moe),
        **write_balance(moe),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    fields.expect("scoring_func", "softmax")
    trunk = read_trunk(fields)
    bias = fields.get("attention_bias", bool, False)
    moe = read_routed_experts(fields, TopKRouting(renormalise=renormalised(fields), epsilon=1e-20))
    config = replace(
        trunk,
        dense_layers=read_first_dense(fields, trunk.n_layers),
        attention=heads.read_heads(fields, heads.equal_share(fields, trunk.width), qkv_bias=bias, out_bias=bias),
        moe=balanced(fields, moe, read_expert_loss(fields)),
    )
    fields.finish()
    return config


FAMILY = Family("deepseek", to_hub, from_hub, names_of(NORMS, GQA, DENSE, EXPERTS, SHARED_EXPERTS))
