"""FP8 numbers (E4M3) with one scale for each block of a weight or group of channels (arXiv 2412.19437, section 3.3)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moekit.config.errors import InputError
from moekit.tensors import Float, Tensor

LARGEST = 448.0
"""Of E4M3: four bits of exponent, three of mantissa, no infinity."""

SIDE = 128
"""Rows and columns of a weight's block, and channels of a token's group."""


class Blocks(NamedTuple):
    """A weight in FP8: each value times the scale of its block. Released checkpoints call that `weight_scale_inv`."""

    values: Float[Tensor, "*batch out in"]
    scale_inv: Float[Tensor, "*batch blocks_out blocks_in"]


def quantise_blocks(weight: Float[Tensor, "*batch out in"]) -> Blocks:
    """Each matrix in blocks of 128 x 128, smaller at the edges, with scale_inv = max |w| / 448 in float32.

    A block of zeros has scale 1. A block with a number that is not finite comes back without a finite number.
    """
    out, width = weight.shape[-2:]
    blocks = _split(_split(weight.float(), -1), -3)
    scale_inv = _scale(blocks, (-3, -1))
    scaled = (blocks / scale_inv).flatten(-4, -3).flatten(-2)[..., :out, :width]
    return Blocks(_encode(scaled), scale_inv.squeeze(-1).squeeze(-2))


def dequantise_blocks(
    values: Float[Tensor, "*batch out in"],
    scale_inv: Float[Tensor, "*batch blocks_out blocks_in"],
    dtype: torch.dtype,
    block: tuple[int, int] = (SIDE, SIDE),
) -> Float[Tensor, "*batch out in"]:
    """values * scale_inv, formed in float32 and rounded to `dtype`; `block` is rows and columns of a block.

    Raises InputError if the scales are not one for each block.
    """
    (rows, columns), (out, width) = block, values.shape[-2:]
    if scale_inv.shape != (*values.shape[:-2], -(-out // rows), -(-width // columns)):
        message = f"scales {list(scale_inv.shape)} do not fit a weight {list(values.shape)}"
        raise InputError(message, f"there must be one for each block of {rows} x {columns}")
    weight = _decode(values)
    whole = out // rows * rows
    # One scale for each column and block of rows is 1/128 of the weight; one for each number would double it.
    scales = scale_inv.float().repeat_interleave(columns, dim=-1)[..., :width]
    weight[..., :whole, :].unflatten(-2, (whole // rows, rows)).mul_(scales[..., : whole // rows, None, :])
    weight[..., whole:, :].mul_(scales[..., whole // rows :, :])
    return weight.to(dtype)


def round_blocks(weight: Float[Tensor, "*batch out in"], parts: int = 1) -> Float[Tensor, "*batch out in"]:
    """What `weight` is after a stay in FP8, in its own type. `parts` matrices above each other have own blocks."""
    matrices = weight.unflatten(-2, (parts, weight.shape[-2] // parts))
    return dequantise_blocks(*quantise_blocks(matrices), weight.dtype).view(weight.shape)


def round_rows(x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
    """Activations after a stay in FP8, in their own type: one scale, max |x| / 448, for each token and 128 channels.

    The gradient passes straight through. A group with a number that is not finite comes back without a finite number.
    """
    return _RoundRows.apply(x)


class _RoundRows(torch.autograd.Function):
    """Rounding is flat almost everywhere; its gradient is taken to be that of the identity (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        groups = _split(x.float(), -1)
        scale = _scale(groups, (-1,))
        rounded = _decode(_encode(groups / scale)).mul_(scale)
        return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        return grads[0]


def _split(x: Tensor, dim: int) -> Tensor:
    """Dimension `dim` (negative) as groups of 128, filled up with zeros, and their members; or as one smaller group."""
    size = x.shape[dim]
    group = min(SIDE, size)
    filled = F.pad(x, (0, 0) * (-dim - 1) + (0, -size % group))
    return filled.unflatten(dim, (filled.shape[dim] // group, group))


def _scale(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max |x| / 448 along `dims`, which stay; 1 where that is 0, since nothing can be divided by it."""
    scale = x.abs().amax(dims, keepdim=True) / LARGEST
    return scale.masked_fill(scale == 0, 1.0)


def _encode(scaled: Tensor) -> Tensor:
    """The nearest E4M3 numbers. The largest may exceed 448 by a rounding of its scale, and not all backends clamp."""
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _decode(values: Tensor) -> Tensor:
    """E4M3 as float32 through a table of all 256: a fifth of the time of the CPU's conversion."""
    table = torch.arange(256, dtype=torch.uint8, device=values.device).view(torch.float8_e4m3fn).float()
    return table.index_select(0, values.view(torch.uint8).flatten().int()).view(values.shape)
