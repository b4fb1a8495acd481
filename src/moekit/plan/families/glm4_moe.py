"""GLM-4.5 and GLM-4.5-Air (arXiv 2508.06471): DeepSeek-V3's experts behind grouped-query attention."""

from collections.abc import Mapping
from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.plan.decoder import Decoder, Dense, Experts, Prediction
from moekit.plan.families.fields import read_choice, read_heads, read_trunk


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`. Released files count the selection bias, and so do we."""
    fields = HubFields(data)
    trunk = read_trunk(fields, name)
    heads = read_heads(
        fields,
        trunk.width,
        qkv_bias=fields.get("attention_bias", bool, False),
        head_norms=fields.get("use_qk_norm", bool, False),
    )
    first = fields.get("first_k_dense_replace", int, 1)
    check(first >= 0, "first_k_dense_replace", f"{first} must not be negative")
    dense = Dense(fields.positive("intermediate_size"))
    experts = _experts(fields)
    ahead = fields.get("num_nextn_predict_layers", int, 0)
    check(0 <= ahead <= trunk.n_layers, "num_nextn_predict_layers", f"{ahead} is not 0 to {trunk.n_layers}")
    fields.finish()
    n_dense = min(first, trunk.n_layers)
    return Decoder(
        **trunk.shape("glm4_moe"),
        heads=heads,
        layers=((dense, n_dense), (experts, trunk.n_layers - n_dense)),
        prediction=Prediction(ahead, experts) if ahead else None,
    )


def _experts(fields: HubFields) -> Experts:
    n_routed, top_k = read_choice(fields, "n_routed_experts", "num_experts_per_tok")
    width, shared = fields.positive("moe_intermediate_size"), fields.get("n_shared_experts", int, 0)
    check(shared >= 0, "n_shared_experts", f"{shared} must not be negative")
    groups = fields.positive("n_group", 1), fields.positive("topk_group", 1)
    return Experts(
        n_routed, top_k, width, shared * width, selection_bias=True, n_groups=groups[0], top_k_groups=groups[1]
    )
