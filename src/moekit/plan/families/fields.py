"""What the families' `config.json` say in the same words, as far as it changes a count."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.config.families.trunk import check_layers
from moekit.config.quantisation import KEY
from moekit.plan.decoder import Heads

WORDS = """
_attn_implementation attention_dropout attn_implementation hidden_act hidden_dropout initializer_range norm_topk_prob
partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta routed_scaling_factor router_jitter_noise
sep_token_id
"""
"""Fields of one or another family that say how a model computes, and leave the number of its weights alone."""


class Trunk(NamedTuple):
    """What every family has."""

    name: str
    vocab_size: int
    width: int
    n_layers: int
    max_positions: int
    tied: bool
    quantisation: str | None

    def shape(self, family: str) -> dict[str, Any]:
        """The fields of a Decoder that these numbers fill."""
        known = {"name": self.name, "family": family, "vocab_size": self.vocab_size, "width": self.width}
        return known | {"max_positions": self.max_positions, "tied": self.tied, "quantisation": self.quantisation}


def read_trunk(fields: HubFields, name: str, tied: bool = False) -> Trunk:
    """The sizes; fields that change no count are passed over. `tied` holds where the file does not say."""
    fields.ignore(*WORDS.split())
    n_layers = fields.positive("num_hidden_layers")
    check_layers(n_layers, "num_hidden_layers")
    return Trunk(
        name,
        fields.positive("vocab_size"),
        fields.positive("hidden_size"),
        n_layers,
        fields.positive("max_position_embeddings"),
        fields.get("tie_word_embeddings", bool, tied),
        quantisation(fields.data),
    )


def read_heads(fields: HubFields, width: int, **settings: Any) -> Heads:
    """Grouped-query heads. Without `head_dim` they share out the width, rounded down as transformers rounds."""
    n_heads = fields.positive("num_attention_heads")
    n_kv_heads = fields.positive("num_key_value_heads", n_heads)
    message = f"{n_kv_heads} does not divide num_attention_heads = {n_heads}"
    check(n_heads % n_kv_heads == 0, "num_key_value_heads", message)
    return Heads(n_heads, n_kv_heads, fields.positive("head_dim", width // n_heads), **settings)


def read_choice(fields: HubFields, experts: str, chosen: str) -> tuple[int, int]:
    """The numbers of routed experts and of those a token takes."""
    n_routed, top_k = fields.positive(experts), fields.positive(chosen)
    check(top_k <= n_routed, chosen, f"{top_k} exceeds {experts} = {n_routed}")
    return n_routed, top_k


def quantisation(data: Mapping[str, Any]) -> str | None:
    """How the weights are stored: `quant_method` of the quantisation, or None. Raises ConfigError."""
    given = data.get(KEY)
    if given is None:
        return None
    check(isinstance(given, dict), KEY, f"{given!r} is not an object")
    method = given.get("quant_method")
    check(isinstance(method, str), f"{KEY}.quant_method", f"{method!r} is no name of a format")
    return method
