"""Attention of one new token of each sequence over what a cache remembers, in one compiled call."""

from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.library import library
from moekit.tensors import Float, Tensor

JOB = Struct("=8Q9qf3i")
"""How `moekit_query` of one_query.h lies in memory."""


class Turn(NamedTuple):
    """The rotation of one place in each sequence (or of all): cosines and sines for half the rotary width, float32.

    The layout says which numbers of a vector are pairs: neighbours, or those half the rotary width apart.
    """

    cos: Float[Tensor, "B_or_1 half"]
    sin: Float[Tensor, "B_or_1 half"]
    interleaved: bool


class Past(NamedTuple):
    """Room for the keys and values of `capacity` tokens, of which `length` are there; written in place.

    Without values, the first numbers of a key are its value.
    """

    keys: Float[Tensor, "B Hkv capacity C"]
    values: Float[Tensor, "B Hkv capacity W"] | None
    length: int


def runs_here(x: Tensor) -> bool:
    """Whether the compiled call computes for tokens like `x`: bfloat16 or float32 on a CPU, without gradients."""
    ours = x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" and x.numel() > 0
    return ours and not torch.is_grad_enabled() and library() is not None


def attend(
    q: Float[Tensor, "B H C"],
    k: Float[Tensor, "B Hkv C"],
    v: Float[Tensor, "B Hkv W"] | None,
    turn: Turn,
    past: Past,
    scale: float,
    width: int,
) -> Float[Tensor, "B H W"]:
    """softmax(scale q k^T) v over the past and the new token, whose key and value are added to it at `past.length`.

    The last numbers of queries and keys are turned. Query heads share key heads in groups (arXiv 2305.13245). `width`
    is that of a value. The new token comes, and the output goes, in bfloat16 or float32 whatever the type of the past.
    """
    compiled = library()
    if compiled is None:
        return attend_twin(q, k, v, turn, past, scale, width)
    q, k, v = q.contiguous(), k.contiguous(), None if v is None else v.contiguous()
    out = q.new_empty(len(q), q.shape[1], width)
    new = (q.data_ptr(), k.data_ptr(), 0 if v is None else v.data_ptr())
    seen = described_past(turn, past, q.shape[1], width, scale, q.dtype == torch.bfloat16, out.data_ptr())
    compiled.moekit_one_query(JOB.pack(*new, *seen), torch.get_num_threads(), compiled.moekit_level())
    return out


def described_past(
    turn: Turn, past: Past, heads: int, width: int, scale: float, narrow: bool, out: int = 0
) -> tuple[int | float, ...]:
    """What `JOB` holds behind the new token: the past that `heads` query heads attend to, with values of `width`, and
    the address `out` for the result; it and the new token are bfloat16 if `narrow`."""
    keys, values, length = past
    cos, sin, interleaved = turn
    batch, kv_heads, capacity, qk_width = keys.shape
    half = cos.shape[-1]
    return (
        cos.data_ptr(),
        sin.data_ptr(),
        keys.data_ptr(),
        0 if values is None else values.data_ptr(),
        out,
        *(batch, heads, kv_heads, qk_width, width, half, capacity, length, half if len(cos) > 1 else 0),
        scale,
        *(keys.dtype == torch.bfloat16, narrow, interleaved),
    )


def attend_twin(
    q: Float[Tensor, "B H C"],
    k: Float[Tensor, "B Hkv C"],
    v: Float[Tensor, "B Hkv W"] | None,
    turn: Turn,
    past: Past,
    scale: float,
    width: int,
) -> Float[Tensor, "B H W"]:
    """As `attend`, in plain torch."""
    keys, values, length = past
    keys[:, :, length] = _turned(k, turn).to(keys.dtype)
    if values is not None and v is not None:
        values[:, :, length] = v.to(values.dtype)
    groups = q.shape[1] // k.shape[1]
    seen = keys[:, :, : length + 1].float().repeat_interleave(groups, dim=1)
    summed = keys[..., :width] if values is None else values
    summed = summed[:, :, : length + 1].float().repeat_interleave(groups, dim=1)
    queries = _turned(q, turn).to(keys.dtype).float().unsqueeze(-2)
    probability = (scale * queries @ seen.mT).softmax(dim=-1)
    return (probability @ summed).squeeze(-2).to(q.dtype)


def _turned(x: Float[Tensor, "B H C"], turn: Turn) -> Float[Tensor, "B H C"]:
    cos, sin = turn.cos.unsqueeze(-2), turn.sin.unsqueeze(-2)
    half = cos.shape[-1]
    still, turning = x.float().split([x.shape[-1] - 2 * half, 2 * half], dim=-1)
    pairs = turning.unflatten(-1, (half, 2)).unbind(-1) if turn.interleaved else turning.chunk(2, dim=-1)
    first, second = pairs
    return torch.cat([still, first * cos - second * sin, second * cos + first * sin], dim=-1)
