"""A decoder told by its numbers, and its blueprint: for models that moekit counts and does not run."""

from collections.abc import Iterable
from typing import NamedTuple

from moekit.config.errors import check
from moekit.plan.blueprint import Attention, Blueprint, Mixture, Part, Weight
from moekit.plan.bulk import Bulk


class Heads(NamedTuple):
    """Attention of every layer. `head_norms` norm each query and key head; `sinks` are one logit for each head."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False
    sinks: bool = False


class Dense(NamedTuple):
    """A dense feed-forward: 3 matrices where it is gated, 2 where it is not."""

    width: int
    matrices: int = 3
    bias: bool = False


class Experts(NamedTuple):
    """A mixture: routed experts of `width`, of which a token takes `top_k`, and what all tokens share.

    A `router` of False leaves the router out, as papers do that count nominal sizes.
    """

    n_routed: int
    top_k: int
    width: int
    shared_width: int = 0
    matrices: int = 3
    bias: bool = False
    shared_bias: bool = False
    router: bool = True
    router_bias: bool = False
    selection_bias: bool = False
    n_groups: int = 1
    top_k_groups: int = 1


class Prediction(NamedTuple):
    """Modules that predict further tokens: a block, a projection of two hidden states, and norms of their own."""

    modules: int
    feed_forward: Dense | Experts
    norms: int = 3


class Decoder(NamedTuple):
    """The numbers of a decoder. `layers` counts its layers by feed-forward, `windows` by how far back they see.

    `norms` stand in each block, and one behind the last; with `norm_bias` each has two vectors.
    """

    name: str
    family: str
    vocab_size: int
    width: int
    max_positions: int
    heads: Heads
    layers: tuple[tuple[Dense | Experts, int], ...]
    windows: tuple[tuple[int | None, int], ...] = ()
    norms: int = 2
    norm_bias: bool = False
    head_bias: bool = False
    tied: bool = False
    prediction: Prediction | None = None
    quantisation: str | None = None
    notes: tuple[str, ...] = ()


def blueprint_of_decoder(decoder: Decoder) -> Blueprint:
    """All tensors in bulk. Raises ConfigError for numbers that make no model."""
    bulk, width, ahead = Bulk(), decoder.width, decoder.prediction
    n_layers = sum(count for _, count in decoder.layers)
    vectors = 1 + decoder.norm_bias
    bulk.add("embedding", "embedding", (decoder.vocab_size, width), 1, kind="lookup")
    _attention(bulk, decoder.heads, width, n_layers, None)
    bulk.add("norms", "norms of a block", (width,), vectors * decoder.norms * n_layers, kind="vector")
    for feed_forward, count in decoder.layers:
        _feed_forward(bulk, feed_forward, width, count, None)
    if ahead is not None:
        _attention(bulk, decoder.heads, width, ahead.modules, "prediction")
        _feed_forward(bulk, ahead.feed_forward, width, ahead.modules, "prediction")
        bulk.add("prediction", "projection", (width, 2 * width), ahead.modules, met=False, blocks=False)
        norms = vectors * (decoder.norms + ahead.norms) * ahead.modules
        bulk.add("prediction", "norms of the module", (width,), norms, met=False, kind="vector")
    bulk.add("norms", "final norm", (width,), vectors * (decoder.norms > 0), kind="vector")
    bulk.add("head", "head, bias", (decoder.vocab_size,), int(decoder.head_bias), kind="vector")
    head = Weight("head", "head", (decoder.vocab_size, width), int(not decoder.tied), 1, blocks=False)
    return Blueprint(
        decoder.name,
        decoder.family,
        width,
        decoder.vocab_size,
        n_layers,
        decoder.max_positions,
        (*bulk.weights, head),
        tuple(_attention_shapes(decoder.heads, decoder.windows or ((None, n_layers),))),
        tuple(_mixtures(decoder)),
        ahead.modules if ahead else 0,
        decoder.quantisation,
        decoder.notes,
    )


def _attention(bulk: Bulk, heads: Heads, width: int, layers: int, inside: Part | None) -> None:
    part, met = inside or "attention", inside is None
    queries, keys = heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim
    for name, out in (("q", queries), ("k", keys), ("v", keys)):
        bulk.add(part, name, (out, width), layers, met)
        bulk.add(part, f"{name}, bias", (out,), layers * heads.qkv_bias, met, "vector")
    bulk.add(part, "output", (width, queries), layers, met)
    bulk.add(part, "output, bias", (width,), layers * heads.out_bias, met, "vector")
    bulk.add(part, "query and key norms", (heads.head_dim,), 2 * layers * heads.head_norms, met, "vector")
    bulk.add(part, "sinks", (heads.n_heads,), layers * heads.sinks, met, "vector")


def _feed_forward(bulk: Bulk, given: Dense | Experts, width: int, layers: int, inside: Part | None) -> None:
    if isinstance(given, Dense):
        check_sizes(dense_width=given.width)
        _dense(bulk, inside or "dense", "dense", given, width, layers, inside is None)
    else:
        _experts(bulk, given, width, layers, inside)


def _dense(bulk: Bulk, part: Part, name: str, given: Dense, width: int, layers: int, met: bool) -> None:
    into = given.matrices - 1
    bulk.add(part, f"{name}, gate and up", (given.width, width), into * layers, met)
    bulk.add(part, f"{name}, down", (width, given.width), layers, met)
    bulk.add(part, f"{name}, gate and up, bias", (given.width,), into * layers * given.bias, met, "vector")
    bulk.add(part, f"{name}, down, bias", (width,), layers * given.bias, met, "vector")


def _experts(bulk: Bulk, given: Experts, width: int, layers: int, inside: Part | None) -> None:
    _check_choice(given)
    met, into = inside is None, given.matrices - 1
    stored, used = layers * given.n_routed, layers * given.top_k * met
    routed, router, shared = inside or "routed", inside or "router", inside or "shared"
    bulk.choose(routed, "experts, gate and up", (given.width, width), into * stored, into * used)
    bulk.choose(routed, "experts, down", (width, given.width), stored, used)
    if given.bias:
        bulk.choose(routed, "experts, gate and up, bias", (given.width,), into * stored, into * used, "vector")
        bulk.choose(routed, "experts, down, bias", (width,), stored, used, "vector")
    if given.shared_width:
        fused = Dense(given.shared_width, given.matrices, given.shared_bias)
        _dense(bulk, shared, "shared experts", fused, width, layers, met)
    bulk.add(router, "centroids", (given.n_routed, width), layers * given.router, met, blocks=False)
    bulk.add(router, "router, bias", (given.n_routed,), layers * given.router_bias, met, "vector")
    bulk.add(router, "selection bias", (given.n_routed,), layers * given.selection_bias, met, "vector")


def check_sizes(**sizes: int) -> None:
    """Raise a ConfigError that names the first size below 1."""
    for key, size in sizes.items():
        check(size > 0, key, f"{size} must be above 0")


def _check_choice(given: Experts) -> None:
    check_sizes(n_routed=given.n_routed, top_k=given.top_k, expert_width=given.width, n_groups=given.n_groups)
    check(given.top_k <= given.n_routed, "top_k", f"{given.top_k} exceeds the {given.n_routed} routed experts")
    size, rest = divmod(given.n_routed, given.n_groups)
    check(not rest, "n_groups", f"{given.n_groups} groups do not divide {given.n_routed} experts")
    groups = given.top_k_groups
    check(1 <= groups <= given.n_groups, "top_k_groups", f"{groups} is not one to {given.n_groups}")
    check(groups * size >= given.top_k, "top_k_groups", f"{groups} groups of {size} hold fewer than {given.top_k}")


def _attention_shapes(heads: Heads, windows: Iterable[tuple[int | None, int]]) -> Iterable[Attention]:
    """Keys and values of every key-value head are kept for each token: 2 h_kv d numbers a layer."""
    n_heads, n_kv_heads, head_dim = heads.n_heads, heads.n_kv_heads, heads.head_dim
    kind = "mha" if n_kv_heads == n_heads else "mqa" if n_kv_heads == 1 else "gqa"
    kept = 2 * n_kv_heads * head_dim, 2 * n_heads * head_dim
    for window, layers in windows:
        yield Attention(kind, layers, n_heads, n_kv_heads, head_dim, head_dim, *kept, window=window)


def _mixtures(decoder: Decoder) -> Iterable[Mixture]:
    for given, layers in decoder.layers:
        if isinstance(given, Experts):
            limited = given.top_k_groups < given.n_groups
            groups = (given.n_groups, given.top_k_groups) if limited else (1, 1)
            expert = _numel(given.width, given.matrices, given.bias, decoder.width)
            shared = _numel(given.shared_width, given.matrices, given.shared_bias, decoder.width)
            yield Mixture(layers, given.n_routed, given.top_k, expert, shared if given.shared_width else 0, *groups)


def _numel(inner: int, matrices: int, bias: bool, width: int) -> int:
    """Parameters of one feed-forward."""
    return matrices * inner * width + bias * ((matrices - 1) * inner + width)
