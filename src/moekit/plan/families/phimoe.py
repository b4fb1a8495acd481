"""Phi-3.5-MoE (arXiv 2404.14219): biases in attention and head, LayerNorms with bias, experts in every layer."""

from collections.abc import Mapping
from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.plan.decoder import Decoder, Experts
from moekit.plan.families.fields import read_choice, read_heads, read_trunk


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`."""
    fields = HubFields(data)
    fields.ignore("input_jitter_noise", "original_max_position_embeddings")
    trunk = read_trunk(fields, name)
    bias = fields.get("attention_bias", bool, False)
    heads = read_heads(fields, trunk.width, qkv_bias=bias, out_bias=bias)
    n_routed, top_k = read_choice(fields, "num_local_experts", "num_experts_per_tok")
    experts = Experts(n_routed, top_k, fields.positive("intermediate_size"))
    window = fields.optional("sliding_window", int)
    check(window is None or window > 0, "sliding_window", f"{window} must be above 0")
    head_bias = fields.get("lm_head_bias", bool, False)
    fields.finish()
    return Decoder(
        **trunk.shape("phimoe"),
        heads=heads,
        layers=((experts, trunk.n_layers),),
        windows=((window, trunk.n_layers),),
        norm_bias=True,
        head_bias=head_bias,
    )
