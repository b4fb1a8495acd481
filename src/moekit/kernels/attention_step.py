"""The attention half of a block for one new token of each of a few sequences, as a job of a compiled call."""

import math
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.one_query import JOB, Past, described_past
from moekit.kernels.products import Described, packed
from moekit.kernels.token import ATTENTION, Rows, job
from moekit.tensors import Tensor

HEAD, TAIL = Struct("=7Q"), Struct("=qffii")
"""What is around the products and the past in `moekit_step` of token.h."""


class Norms(NamedTuple):
    """The weights of the norms before attention and after the sum, and of queries and keys where these are normed:
    the heads of a token as a whole, or each."""

    weights: tuple[Tensor, ...]
    whole: bool
    epsilon: float


def attention_step(
    rows: Rows, norms: Norms, layers: Sequence[Described], past: Past, scale: float, clip: float | None
) -> bytes:
    """The job that adds attention(norm(stream)) to the residual stream, and norms that. `layers` are those of queries,
    keys, values and output.

    Everything is in the type of the stream, bfloat16 or float32. Queries, keys and values lie between -clip and clip.
    The length of the past is told when the job is done.
    """
    before, after, query, key = (*(each.data_ptr() for each in norms.weights), 0, 0)[:4]
    stream, dtype, width = rows.stream.data_ptr(), rows.stream.dtype, rows.stream.shape[-1]
    addresses = HEAD.pack(stream, before, after, stream, rows.normed.data_ptr(), query, key)
    described = b"".join(packed(layer, dtype) for layer in layers)
    key_width, value_width = past.keys.shape[-1], (past.keys if past.values is None else past.values).shape[-1]
    seen = described_past(rows.turn, past, layers[0][1] // key_width, value_width, scale, narrow=False)
    last = TAIL.pack(width, norms.epsilon, math.inf if clip is None else clip, dtype == torch.bfloat16, norms.whole)
    return job(ATTENTION, b"".join((addresses, described, JOB.pack(0, 0, 0, *seen), last)))
