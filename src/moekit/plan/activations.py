"""What moekit keeps of a forward pass for the backward, and what it holds for a moment, in bytes.

Derived from the code: each term is a tensor that autograd or a gradient of our own saves. Planned for a CPU on which
moekit's compiled kernels run (AVX512 with BF16): without them, experts, SwiGLU and attention keep more. Rotation tables
and masks are left out.
"""

import math
from typing import NamedTuple

from moekit.plan.blueprint import Attention, Blueprint, Mixture

LANES = 16
"""Compiled logits are for widths and numbers of experts that are multiples of it."""

GROUP = 32 << 20
"""Bytes of experts' rows at most after which that block adds them up, while it computes as many others."""

NARROW, MANY = 128, 4
"""Bytes of a hidden row up to which, and rows of an expert for each of its inner numbers from which on, its rows are
added up as they are computed, and need no room."""

CHUNK = 512
"""Rows of logits that the loss forms at a time."""


class Batch(NamedTuple):
    """`sequences` of `length` tokens computed at once in numbers of `width` bytes (2 or 4)."""

    sequences: int
    length: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.sequences * self.length


def saved(blueprint: Blueprint, batch: Batch) -> int:
    """Bytes kept from forward to backward, with the gradients of head and states that the loss forms in its forward."""
    d, b = blueprint.width, batch.width
    # The last norm's output, the gradient of that, and the factor in float32.
    each = saved_by_layers(blueprint, batch) + 2 * d * b + 4
    for _ in range(blueprint.prediction_modules):
        # Besides its block: two norms, their outputs as one input, and a last norm with its gradient.
        each += _saved_by_module(blueprint, batch) + 6 * d * b + 12
    heads = 1 + blueprint.prediction_modules
    return batch.tokens * each + heads * blueprint.vocab_size * d * b


def saved_by_layers(blueprint: Blueprint, batch: Batch) -> int:
    """Bytes kept for one token by all layers."""
    d, b = blueprint.width, batch.width
    rank = compressed_queries(blueprint)
    attention = sum(a.layers * saved_by_attention(a, rank, batch) for a in blueprint.attentions)
    mixtures = sum(m.layers * saved_by_mixture(m, d, batch) for m in blueprint.mixtures)
    # Gate and up.
    dense = 2 * dense_widths(blueprint) * b
    return attention + mixtures + dense + blueprint.layers * _saved_by_norms(d, b) + _saved_by_head_norms(blueprint, b)


def _saved_by_module(blueprint: Blueprint, batch: Batch) -> int:
    """The block of a prediction module: like the last layer, with experts if any layer has them."""
    d, b = blueprint.width, batch.width
    attention = saved_by_attention(blueprint.attentions[-1], compressed_queries(blueprint), batch)
    if blueprint.mixtures:
        return attention + saved_by_mixture(blueprint.mixtures[-1], d, batch) + _saved_by_norms(d, b)
    return attention + 2 * dense_widths(blueprint) * b // dense_layers(blueprint) + _saved_by_norms(d, b)


def _saved_by_norms(width: int, number: int) -> int:
    """Two norms of a block: the output and the factor in float32."""
    return 2 * (width * number + 4)


def _saved_by_head_norms(blueprint: Blueprint, number: int) -> int:
    """Norms of queries and keys, where there are any: the output of all heads, and at most a factor for each."""
    if not any(w.name == "query norm" for w in blueprint.weights):
        return 0
    return sum(a.layers * (a.n_heads + a.n_kv_heads) * (a.qk_dim * number + 4) for a in blueprint.attentions)


def saved_by_attention(attention: Attention, compressed: int, batch: Batch) -> int:
    """Bytes kept for one token by one layer. `compressed` is the rank of MLA's queries, 0 without.

    The norm of a latent keeps its output, and the factor in float32.
    """
    a, b = attention, batch.width
    norms = sum(rank * b + 4 for rank in (compressed, a.latent) if rank)
    # Queries, keys, values, the output, which the next product reads, and the logarithm of a sum. The fused kernel that
    # runs in float32 keeps them padded to one width; the next product then reads a copy of the output.
    numbers = 2 * a.qk_dim + a.v_dim if b == 2 else 4 * max(a.qk_dim, a.v_dim)
    core = (numbers + a.v_dim) * b + 4
    return norms + a.n_heads * core


def _values(attention: Attention) -> int:
    """Width of a head's values as they are kept: MLA's are a view of keys and values that come from one product."""
    a = attention
    return a.qk_dim - a.rotary + a.v_dim if a.latent else a.v_dim


def saved_by_mixture(mixture: Mixture, width: int, batch: Batch) -> int:
    """Bytes kept for one token by one layer: the router's logits and scores, the places, gate and up of each row."""
    b = batch.width
    # The compiled logits read the tokens as they are; torch's, in other shapes, a copy in float32.
    copied = b == 2 and (mixture.n_routed % LANES or width % LANES)
    router = (4 * width if copied else 0) + 8 * mixture.n_routed
    places = 32 * mixture.top_k
    rows = mixture.top_k * inner(mixture.expert, width) + inner(mixture.shared, width)
    return router + places + 2 * rows * b


def loss_peak(blueprint: Blueprint, batch: Batch) -> int:
    """Bytes that the loss holds for a moment: the head's gradient as summed in float32, a chunk's share of it and its
    logits, and the states' gradient. In float32 a single chunk's share is the sum.
    """
    b, one = batch.width, batch.tokens <= CHUNK
    head = 4 + 2 if b == 2 else 4 if one else 4 + 4
    logits = blueprint.vocab_size * min(CHUNK, batch.tokens) * b
    return blueprint.vocab_size * blueprint.width * head + logits + batch.tokens * blueprint.width * b


def backward_peak(blueprint: Blueprint, batch: Batch) -> int:
    """Bytes that the backward of the largest block holds for a moment, without the gradients of weights.

    Three gradients of the residual stream's size, with the experts' (products of gate and up; where rows are written,
    those of two groups of experts and the sum of groups), a dense block's, or attention's (of queries, keys, values,
    heads and what they came from).
    """
    d, b = blueprint.width, batch.width
    experts = max((_experts_backward(m, d, batch) for m in blueprint.mixtures), default=0)
    layers = dense_layers(blueprint)
    dense = batch.tokens * b * dense_widths(blueprint) // layers if layers else 0
    heads = max((a.n_heads * (3 * a.qk_dim + 2 * a.v_dim + _values(a)) for a in blueprint.attentions), default=0)
    return 3 * batch.tokens * d * b + max(experts, dense, batch.tokens * b * heads)


def _experts_backward(mixture: Mixture, width: int, batch: Batch) -> int:
    n_rows, narrow = mixture.top_k * batch.tokens, inner(mixture.expert, width)
    inners = n_rows * narrow * batch.width
    if narrow * batch.width <= NARROW and n_rows > MANY * narrow * mixture.n_routed:
        return inners
    rows = n_rows * width * batch.width
    # The last group is half as large as the others, and two of them are there at a time.
    groups = 1 if rows <= GROUP else math.ceil(rows / GROUP + 0.5)
    room = min(rows, math.ceil(2 * rows / (groups - 0.5)))
    sums = batch.tokens * width * 4 if groups > 1 else 0
    return inners + room + sums


def working_set(blueprint: Blueprint, tokens: int, width: int) -> int:
    """Bytes that a forward pass of `tokens` without gradients holds at its largest block, in numbers of `width` bytes.

    The residual stream and its norm, with the experts' rows (gate, up, their product, and the result), or a dense block
    (gate, up, silu, product), or attention's padded operands, whichever is more: as torch computes them; compiled
    blocks need less of it, and hold buffers of their own.
    """
    d = blueprint.width
    mixture = max((m.top_k * (3 * inner(m.expert, d) + d) for m in blueprint.mixtures), default=0)
    layers = dense_layers(blueprint)
    dense = 4 * dense_widths(blueprint) // layers if layers else 0
    attention = max((_operands(a) for a in blueprint.attentions), default=0)
    return tokens * width * (2 * d + max(mixture, dense, attention))


def logits(blueprint: Blueprint, sequences: int, width: int) -> int:
    """Bytes of the last token's logits of each sequence, once as computed and once in float32."""
    return sequences * blueprint.vocab_size * (width + 4)


def _operands(attention: Attention) -> int:
    """Numbers for each token while heads are computed: queries twice, keys, values and the output at one width."""
    a = attention
    expanded = a.n_heads * (a.qk_dim - a.rotary + a.v_dim) if a.latent else 2 * a.n_kv_heads * a.qk_dim
    return expanded + 5 * a.n_heads * max(a.qk_dim, a.v_dim)


def inner(parameters: int, width: int) -> int:
    """The inner width of a block with so many parameters, which is taken to be SwiGLU: three matrices."""
    return parameters // (3 * width)


def dense_layers(blueprint: Blueprint) -> int:
    """Layers without experts."""
    return max(blueprint.layers - sum(m.layers for m in blueprint.mixtures), 0)


def dense_widths(blueprint: Blueprint) -> int:
    """The inner widths of the dense layers, summed."""
    return inner(sum(w.stored for w in blueprint.weights if w.part == "dense"), blueprint.width)


def compressed_queries(blueprint: Blueprint) -> int:
    """The rank of MLA's compressed queries; 0 without."""
    return next((w.shape[0] for w in blueprint.weights if w.name == "q_a"), 0)
