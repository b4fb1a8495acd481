"""The attention half of a block for one new token of each of a few sequences, as a job of a compiled call."""

import math
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.linear import Described
from moekit.kernels.one_query import JOB, Past, described_past
from moekit.kernels.token import ATTENTION, LATENT_ATTENTION, Rows, job
from moekit.tensors import Float, Tensor

HEAD, TAIL = Struct("=7Q"), Struct("=qffii")
"""What is around the products and the past in `moekit_step` of token.h."""

LATENT_HEAD, LATENT_TAIL = Struct("=8Q"), Struct("=3q2fq")
"""The same of `moekit_latent_step`."""

PRODUCT = Struct("=QqqqiiQQq")
"""How `moekit_product` of products.h lies in memory."""

NO_LAYER: Described = (0, 0, 0, 0, 16, 0, 0)


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
    described = _products(layers, dtype)
    key_width, value_width = past.keys.shape[-1], (past.keys if past.values is None else past.values).shape[-1]
    seen = described_past(rows.turn, past, layers[0][1] // key_width, value_width, scale, narrow=False)
    last = TAIL.pack(width, norms.epsilon, math.inf if clip is None else clip, dtype == torch.bfloat16, norms.whole)
    return job(ATTENTION, b"".join((addresses, described, JOB.pack(0, 0, 0, *seen), last)))


class Latent(NamedTuple):
    """Shape and weights of latent attention (arXiv 2405.04434, section 2.1)."""

    n_heads: int
    nope: int
    value: int
    latent: int
    query_norm: Float[Tensor, " R"] | None
    latent_norm: Float[Tensor, " L"]
    kv_b: Float[Tensor, "O L"]
    epsilon: float


def latent_attention_step(
    rows: Rows, norms: Norms, layers: Sequence[Described | None], latent: Latent, past: Past, scale: float
) -> bytes:
    """As `attention_step` for latent attention; `layers` are those of queries, of queries from their latent (None:
    there is none), of latent and rotary key, and of the output. The past is [B 1 capacity latent + rope]."""
    before, after = (each.data_ptr() for each in norms.weights)
    dtype, stream = rows.stream.dtype, rows.stream.data_ptr()
    query_norm = 0 if latent.query_norm is None else latent.query_norm.data_ptr()
    weights = (query_norm, latent.latent_norm.data_ptr(), latent.kv_b.data_ptr())
    addresses = LATENT_HEAD.pack(stream, before, after, stream, rows.normed.data_ptr(), *weights)
    described = _products(layers, dtype)
    seen = described_past(rows.turn, past, latent.n_heads, latent.latent, scale, narrow=False)
    sizes = (rows.stream.shape[-1], latent.nope, latent.value)
    last = LATENT_TAIL.pack(*sizes, norms.epsilon, latent.epsilon, dtype == torch.bfloat16)
    return job(LATENT_ATTENTION, b"".join((addresses, described, JOB.pack(0, 0, 0, *seen), last)))


def _products(layers: Sequence[Described | None], dtype: torch.dtype) -> bytes:
    """The layers as compiled code takes them: biases are of `dtype`, where results go is told later."""
    return b"".join(PRODUCT.pack(*(layer or NO_LAYER), 0, dtype == torch.bfloat16) for layer in layers)
