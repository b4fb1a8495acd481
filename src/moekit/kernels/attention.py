"""Causal attention in bfloat16 that keeps no scores: a head at a time for each thread."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import NamedTuple

import torch

from moekit.kernels.library import kernels, library
from moekit.tensors import Float, Tensor


class _Heads(ctypes.Structure):
    """`moekit_heads` of attention.cpp."""

    _fields_ = (("first", c_void_p), ("batch_step", c_int64), ("head_step", c_int64), ("row_step", c_int64))


class _Attention(ctypes.Structure):
    """`moekit_attention` of attention.cpp."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")),
        ("normaliser", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "length", "qk_width", "v_width")),
        ("scale", c_float),
    )


class Attended(NamedTuple):
    """What attention gives, and the logarithm (base 2) of each query's sum of exponentials for the backward."""

    out: Float[Tensor, "B H S W"]
    normaliser: Float[Tensor, "B H S"]


def runs_here(*tensors: Tensor) -> bool:
    """Whether the functions below can run on these queries, keys and values: bfloat16 on a CPU with AVX512-BF16."""
    ours = all(t.device.type == "cpu" and t.dtype == torch.bfloat16 and t.numel() for t in tensors)
    compiled = library() if ours else None
    return compiled is not None and compiled.moekit_level() >= 2


def attend(
    q: Float[Tensor, "B H S C"], k: Float[Tensor, "B H S C"], v: Float[Tensor, "B H S W"], scale: float
) -> Attended:
    """softmax(q k^T scale) v, each query with the keys up to its own."""
    q, k, v = map(_by_rows, (q, k, v))
    found = Attended(_new_heads(v), torch.empty(q.shape[:3], dtype=torch.float32))
    _call("moekit_attend", found.normaliser, scale, q=q, k=k, v=v, out=found.out)
    return found


def attend_backward(
    q: Float[Tensor, "B H S C"],
    k: Float[Tensor, "B H S C"],
    v: Float[Tensor, "B H S W"],
    out: Float[Tensor, "B H S W"],
    normaliser: Float[Tensor, "B H S"],
    grad_out: Float[Tensor, "B H S W"],
    scale: float,
) -> tuple[Float[Tensor, "B H S C"], Float[Tensor, "B H S C"], Float[Tensor, "B H S W"]]:
    """The gradients of q, k and v."""
    given = dict(zip(("q", "k", "v", "out", "grad_out"), map(_by_rows, (q, k, v, out, grad_out)), strict=True))
    grads = (_new_heads(q), _new_heads(k), _new_heads(v))
    _call(
        "moekit_attend_backward",
        normaliser,
        scale,
        **given,
        **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)),
    )
    return grads


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _new_heads(like: Float[Tensor, "B H S W"]) -> Float[Tensor, "B H S W"]:
    """Uninitialised, with the heads of a token side by side, as the layers around want them."""
    batch, heads, length, width = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


def _call(function: str, normaliser: Tensor, scale: float, **tensors: Tensor) -> None:
    compiled = kernels()
    heads = {name: _Heads(x.data_ptr(), *x.stride()[:3]) for name, x in tensors.items()}
    batch, n_heads, length, qk_width = tensors["q"].shape
    job = _Attention(**heads, normaliser=normaliser.data_ptr(), batch=batch, heads=n_heads, length=length)
    job.qk_width, job.v_width, job.scale = qk_width, tensors["v"].shape[-1], scale
    getattr(compiled, function)(ctypes.byref(job), torch.get_num_threads(), compiled.moekit_level())
