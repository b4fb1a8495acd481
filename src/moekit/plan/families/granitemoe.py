"""Granite 3.0 MoE (IBM, 2024): small experts in every layer, constant factors, embedding and head tied."""

from collections.abc import Mapping
from typing import Any

from moekit.config.families.hub import HubFields
from moekit.plan.decoder import Decoder, Experts
from moekit.plan.families.fields import read_choice, read_heads, read_trunk


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`."""
    fields = HubFields(data)
    fields.ignore("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
    trunk = read_trunk(fields, name)
    bias = fields.get("attention_bias", bool, False)
    heads = read_heads(fields, trunk.width, qkv_bias=bias, out_bias=bias)
    n_routed, top_k = read_choice(fields, "num_local_experts", "num_experts_per_tok")
    experts = Experts(n_routed, top_k, fields.positive("intermediate_size"))
    fields.finish()
    return Decoder(**trunk.shape("granitemoe"), heads=heads, layers=((experts, trunk.n_layers),))
