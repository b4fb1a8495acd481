"""gpt-oss (arXiv 2508.10925): biases everywhere, attention sinks, windows in every other layer, MXFP4 experts."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.plan.decoder import Decoder, Experts
from moekit.plan.families.fields import read_choice, read_heads, read_trunk

WINDOWED, FULL = "sliding_attention", "full_attention"


def read(data: Mapping[str, Any], name: str) -> Decoder:
    """The decoder in `config.json`."""
    fields = HubFields(data)
    # The limit and the slope of the experts' activation, and the context before its extension.
    fields.ignore("swiglu_limit", "swiglu_alpha", "initial_context_length")
    trunk = read_trunk(fields, name)
    bias = fields.get("attention_bias", bool, True)
    heads = read_heads(fields, trunk.width, qkv_bias=bias, out_bias=bias, sinks=True)
    n_routed, top_k = read_choice(fields, "num_local_experts", "num_experts_per_tok")
    fields.expect("experts_per_token", top_k)
    fields.expect("num_experts", n_routed)
    experts = Experts(n_routed, top_k, fields.positive("intermediate_size"), bias=True, router_bias=True)
    windows = _windows(fields, trunk.n_layers)
    fields.finish()
    return Decoder(**trunk.shape("gpt_oss"), heads=heads, layers=((experts, trunk.n_layers),), windows=windows)


def _windows(fields: HubFields, n_layers: int) -> tuple[tuple[int | None, int], ...]:
    """How many layers see a window and how many see everything; unless the file says which, they take turns."""
    window = fields.optional("sliding_window", int)
    kinds = fields.get("layer_types", list, [(WINDOWED, FULL)[layer % 2] for layer in range(n_layers)])
    check(len(kinds) == n_layers, "layer_types", f"names {len(kinds)} layers of {n_layers}")
    other = next((kind for kind in kinds if kind not in (WINDOWED, FULL)), None)
    check(other is None, "layer_types", f"{other!r} is not supported for this family")
    check(window is None or window > 0, "sliding_window", f"{window} must be above 0")
    counted = Counter(window if kind == WINDOWED else None for kind in kinds)
    return tuple(counted.items())
