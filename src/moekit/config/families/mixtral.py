"""Mixtral (arXiv 2401.04088): experts in every layer, chosen first and weighed by a softmax among the chosen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.balance import ExpertLoss
from moekit.config.errors import check
from moekit.config.families.attention import n_heads_of, read_heads, write_heads
from moekit.config.families.balance import balanced, write_balance
from moekit.config.families.experts import read_experts
from moekit.config.families.family import Family, Names
from moekit.config.families.hub import HubFields
from moekit.config.families.names import GQA, NORMS, names_of
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import GQAConfig, ModelConfig
from moekit.config.routing import TopKRouting

EXPERTS: Names = {
    "feed_forward.router.centroids": "block_sparse_moe.gate.weight",
    "feed_forward.experts.gate_up": (
        "block_sparse_moe.experts.{expert}.w1.weight",
        "block_sparse_moe.experts.{expert}.w3.weight",
    ),
    "feed_forward.experts.down": "block_sparse_moe.experts.{expert}.w2.weight",
}

PUBLISHED = (ExpertLoss(coefficient=0.02, scope="micro_batch"),)


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`."""
    attention, moe = config.attention, config.moe
    if not isinstance(attention, GQAConfig):
        return None
    return {
        **write_trunk(config, "mixtral", "MixtralForCausalLM"),
        "intermediate_size": moe.expert_width,
        **write_heads(attention),
        "head_dim": attention.head_dim,
        "sliding_window": None,
        "num_local_experts": moe.n_routed,
        "num_experts_per_tok": moe.top_k,
        "router_jitter_noise": 0.0,
        **write_balance(moe),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    # Noise has no effect on an evaluation, but whoever trains on would lose it.
    fields.expect("router_jitter_noise", 0.0)
    trunk = read_trunk(fields, theta=1e6)
    window = fields.optional("sliding_window", int)
    whole = window is None or window >= trunk.max_positions
    check(whole, "sliding_window", f"{window} is not supported", "moekit has full attention alone")
    moe = read_experts(fields, "intermediate_size", TopKRouting(order="top_k_then_score"))
    config = replace(
        trunk,
        attention=read_heads(fields, trunk.width // n_heads_of(fields)),
        moe=balanced(fields, moe, PUBLISHED),
    )
    fields.finish()
    return config


FAMILY = Family("mixtral", to_hub, from_hub, names_of(NORMS, GQA, EXPERTS))
