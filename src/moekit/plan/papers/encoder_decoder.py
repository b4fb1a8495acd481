"""An encoder and a decoder of the same depth, whose feed-forwards are in part mixtures: Switch and GShard."""

from typing import NamedTuple

from moekit.plan.blueprint import Attention, Blueprint, Mixture, Weight
from moekit.plan.bulk import Bulk

NOTE = (
    "a token of the source meets the encoder, one of the target the decoder: active parameters and FLOPs count a pair "
    "of both; norms and position biases are left out, which are below 0.1%"
)


class Pair(NamedTuple):
    """Encoder and decoder of `layers` each; every `every`-th layer is a mixture."""

    name: str
    family: str
    vocab_size: int
    width: int
    inner: int
    n_heads: int
    head_dim: int
    layers: int
    every: int
    n_routed: int
    top_k: int
    matrices: int
    length: int
    tied: bool
    notes: tuple[str, ...]


def blueprint_of_pair(pair: Pair) -> Blueprint:
    """All matrices in bulk. The decoder attends to itself and to the encoder, so that it holds twice the attention."""
    bulk, width, inner = Bulk(), pair.width, pair.inner
    mixed = 2 * pair.layers // pair.every
    dense, heads, gates = 2 * pair.layers - mixed, pair.n_heads * pair.head_dim, pair.matrices - 1
    bulk.add("embedding", "embedding", (pair.vocab_size, width), 1, kind="lookup")
    for name, layers in (("encoder", pair.layers), ("decoder", pair.layers), ("cross", pair.layers)):
        bulk.add("attention", f"{name}, q, k and v", (heads, width), 3 * layers)
        bulk.add("attention", f"{name}, output", (width, heads), layers)
    bulk.add("dense", "dense, into", (inner, width), gates * dense)
    bulk.add("dense", "dense, down", (width, inner), dense)
    stored, used = mixed * pair.n_routed, mixed * pair.top_k
    bulk.choose("routed", "experts, into", (inner, width), gates * stored, gates * used)
    bulk.choose("routed", "experts, down", (width, inner), stored, used)
    bulk.add("router", "centroids", (pair.n_routed, width), mixed, blocks=False)
    head = Weight("head", "head", (pair.vocab_size, width), int(not pair.tied), 1, blocks=False)
    mixture = Mixture(mixed, pair.n_routed, pair.top_k, pair.matrices * inner * width, 0)
    return Blueprint(
        pair.name,
        pair.family,
        width,
        pair.vocab_size,
        2 * pair.layers,
        pair.length,
        (*bulk.weights, head),
        _attentions(pair),
        (mixture,),
        notes=(*pair.notes, NOTE),
    )


def _attentions(pair: Pair) -> tuple[Attention, ...]:
    """The encoder keeps nothing from token to token, the decoder its own keys and values and the encoder's."""
    kept = 2 * pair.n_heads * pair.head_dim
    heads = pair.layers, pair.n_heads, pair.n_heads, pair.head_dim, pair.head_dim
    return (
        Attention("mha", *heads, 0, 0, causal=False),
        Attention("mha", *heads, kept, kept),
        Attention("mha", *heads, kept, kept, causal=False),
    )
