"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moekit.config.errors import check
from moekit.config.families.attention import read_latent, write_latent
from moekit.config.families.balance import balanced, read_expert_loss, write_balance, write_expert_loss
from moekit.config.families.experts import read_routed_experts, renormalised, write_routed_experts
from moekit.config.families.family import Family
from moekit.config.families.hub import HubFields
from moekit.config.families.layers import read_first_dense, write_first_dense
from moekit.config.families.names import DENSE, EXPERTS, MLA, NORMS, SHARED_EXPERTS, hollow, in_layers, names_of
from moekit.config.families.trunk import read_trunk, write_trunk
from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.routing import TopKRouting

LIMITED = "group_limited_greedy"
"""The choice within the best groups; `greedy` is the choice among all experts."""


def zeros(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """transformers builds shared experts even where there are none."""
    return {} if config.moe.n_shared else in_layers(config.moe_layers, hollow(config, "mlp.shared_experts"))


def to_hub(config: ModelConfig) -> dict[str, Any] | None:
    """`config.json`, or None where the family has no words for `config`, or transformers reads others into them."""
    attention, routing, layers = config.attention, config.moe.top_k_routing, write_first_dense(config)
    # transformers scales weights whatever norm_topk_prob, ignores moe_layer_freq, and wants widths that divide.
    followed = not routing.renormalise and layers["moe_layer_freq"] == 1
    if not isinstance(attention, MLAConfig) or not followed or config.width % attention.n_heads:
        return None
    return {
        **write_trunk(config, "deepseek_v2", "DeepseekV2ForCausalLM"),
        **write_latent(attention),
        **layers,
        **write_routed_experts(config.moe),
        "scoring_func": "softmax",
        "topk_method": LIMITED if routing.top_k_groups < routing.n_groups else "greedy",
        "n_group": routing.n_groups,
        "topk_group": routing.top_k_groups,
        "routed_scaling_factor": routing.scale,
        **write_expert_loss(config.moe),
        **write_balance(config.moe),
    }


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    fields = HubFields(data)
    fields.expect("scoring_func", "softmax")
    fields.expect("mlp_bias", False)
    trunk = read_trunk(fields, "interleaved", latent=True)
    config = replace(
        trunk,
        dense_layers=read_first_dense(fields, trunk.n_layers),
        attention=read_latent(fields),
        moe=balanced(fields, read_routed_experts(fields, _routing(fields)), read_expert_loss(fields)),
    )
    fields.finish()
    return config


def _routing(fields: HubFields) -> TopKRouting:
    """The released code either divides the weights by their sum or scales them, never both."""
    method, renormalise = fields.get("topk_method", str, "greedy"), renormalised(fields)
    check(method in ("greedy", LIMITED), "topk_method", f"{method!r} is not supported for this family")
    scale = fields.get("routed_scaling_factor", float, 1.0)
    # Without a limit the groups have no effect.
    fields.ignore("n_group", "topk_group")
    limited = method == LIMITED
    return TopKRouting(
        renormalise=renormalise,
        epsilon=1e-20,
        scale=1.0 if renormalise else scale,
        n_groups=fields.get("n_group", int) if limited else 1,
        top_k_groups=fields.get("topk_group", int) if limited else 1,
    )


FAMILY = Family("deepseek_v2", to_hub, from_hub, names_of(NORMS, MLA, DENSE, EXPERTS, SHARED_EXPERTS), zeros=zeros)
