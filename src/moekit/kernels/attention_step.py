"""The attention half of a block for one new token of each of a few sequences, in one compiled call."""

import math
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.library import library
from moekit.kernels.one_query import JOB, Past, Turn, described_past
from moekit.kernels.products import Described, packed
from moekit.tensors import Float, Tensor

HEAD, TAIL = Struct("=7Q"), Struct("=qffii")
"""What is around the products and the past in `moekit_step` of attention_step.cpp."""


class Norms(NamedTuple):
    """The weights of the norms before attention and after the sum, and of queries and keys where these are normed:
    the heads of a token as a whole, or each."""

    weights: tuple[Tensor, ...]
    whole: bool
    epsilon: float


def attention_step(
    x: Float[Tensor, "B 1 D"],
    norms: Norms,
    layers: Sequence[Described],
    turn: Turn,
    past: Past,
    scale: float,
    clip: float | None,
) -> tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B 1 D"]]:
    """x + attention(norm(x)), and the norm of that. `layers` are those of queries, keys, values and output.

    Everything is in the type of `x`, bfloat16 or float32, and compiled code is there. Queries, keys and values lie
    between -clip and clip.
    """
    compiled = library()
    assert compiled is not None
    x = x.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    before, after, query, key = (*(each.data_ptr() for each in norms.weights), 0, 0)[:4]
    rows = (x.data_ptr(), before, after, total.data_ptr(), normed.data_ptr(), query, key)
    described = b"".join(packed(layer, x.dtype) for layer in layers)
    heads = layers[0][1] // past.keys.shape[-1]
    width = past.keys.shape[-1] if past.values is None else past.values.shape[-1]
    seen = JOB.pack(0, 0, 0, *described_past(turn, past, heads, width, scale, narrow=False))
    bound = math.inf if clip is None else clip
    last = TAIL.pack(x.shape[-1], norms.epsilon, bound, x.dtype == torch.bfloat16, norms.whole)
    step = b"".join((HEAD.pack(*rows), described, seen, last))
    compiled.moekit_attention_step(step, torch.get_num_threads(), compiled.moekit_level())
    return total, normed
