"""DBRX (Databricks, 2024): sixteen experts in every layer, LayerNorms without bias.

Its one matrix for queries, keys and values counts the same as three.
"""

from collections.abc import Mapping
from typing import Any

from moekit.config.errors import ConfigError, check
from moekit.config.families.hub import HubFields
from moekit.config.families.trunk import check_layers
from moekit.plan.decoder import Decoder, Experts, Heads
from moekit.plan.families.fields import quantisation, read_choice


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`, which has names and two sections of its own."""
    fields = HubFields(data)
    fields.ignore("resid_pdrop", "emb_pdrop", "initializer_range", "rope_parameters", "rope_scaling", "rope_theta")
    width, n_heads, n_layers = (fields.positive(key) for key in ("d_model", "n_heads", "n_layers"))
    check_layers(n_layers, "n_layers")
    check(width % n_heads == 0, "n_heads", f"{n_heads} does not divide d_model = {width}")
    n_kv_heads = _section(fields, "attn_config", _kv_heads)
    check(n_heads % n_kv_heads == 0, "attn_config.kv_n_heads", f"{n_kv_heads} does not divide n_heads = {n_heads}")
    fields.expect("num_key_value_heads", n_kv_heads)
    experts = _section(fields, "ffn_config", lambda section: _experts(section, width))
    decoder = Decoder(
        name,
        "dbrx",
        fields.positive("vocab_size"),
        width,
        fields.positive("max_seq_len"),
        Heads(n_heads, n_kv_heads, width // n_heads),
        ((experts, n_layers),),
        tied=fields.get("tie_word_embeddings", bool, False),
        quantisation=quantisation(data),
    )
    fields.finish()
    return decoder


def _section(fields: HubFields, key: str, reader: Any) -> Any:
    section = HubFields(fields.get(key, dict, {}))
    try:
        found = reader(section)
        section.finish()
    except ConfigError as error:
        raise error.inside(key) from None
    return found


def _kv_heads(section: HubFields) -> int:
    section.ignore("attn_pdrop", "clip_qkv", "rope_theta")
    return section.positive("kv_n_heads", 1)


def _experts(section: HubFields, width: int) -> Experts:
    section.ignore("ffn_act_fn", "moe_jitter_eps", "moe_loss_weight", "moe_normalize_expert_weights")
    section.ignore("uniform_expert_assignment")
    section.expect("hidden_size", width)
    n_routed, top_k = read_choice(section, "moe_num_experts", "moe_top_k")
    return Experts(n_routed, top_k, section.positive("ffn_hidden_size"))
