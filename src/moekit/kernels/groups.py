"""Matrices of 8- or 4-bit numbers in groups: how they are made, how they lie in memory and on disk, what they mean.

A row of a matrix [out, in] with groups of g numbers is, byte after byte: all its numbers, then for each group scale
and least value in float16. With 8 bits a number is a byte; with 4 bits byte j of a group holds number j in its low half
and number j + g/2 in its high half. A weight is scale * number + least: in + 4 in/g or in/2 + 4 in/g bytes a row. The
format is the same on every machine.
"""

from typing import NamedTuple

import torch
from jaxtyping import UInt8

from moekit.tensors import Float, Int, Tensor

GROUPS = (32, 64, 128)
BITS = (4, 8)


class Grouped(NamedTuple):
    """A quantised matrix, or a stack of them: rows of bytes, and what they are."""

    rows: UInt8[Tensor, "*stack O bytes"]
    bits: int
    group: int

    @property
    def inputs(self) -> int:
        """Numbers in a row."""
        return self.rows.shape[-1] * 8 * self.group // (self.bits * self.group + 32)


def row_bytes(inputs: int, bits: int, group: int) -> int:
    """Bytes of a row of `inputs` numbers."""
    return inputs * bits // 8 + inputs // group * 4


def quantise(weight: Float[Tensor, "*stack O I"], bits: int, group: int) -> Grouped:
    """Round each group to 2^bits equally spaced values from its least to its greatest.

    |w - restored| is at most half a step, (greatest - least) / (2^bits - 1) / 2, and what float16 adds: one part in
    2048 of |least| and of the group's span. Raises ValueError where groups do not divide a row.
    """
    if bits not in BITS or group not in GROUPS or weight.shape[-1] % group:
        raise ValueError(f"no groups of {group} numbers of {bits} bits in rows of {weight.shape[-1]}")
    groups = weight.float().unflatten(-1, (-1, group))
    least, greatest = groups.amin(dim=-1), groups.amax(dim=-1)
    least16 = least.half()
    scale16 = ((greatest - least16.float()).clamp_min(0) / (2**bits - 1)).half()
    step = scale16.float().unsqueeze(-1)
    numbers = ((groups - least16.float().unsqueeze(-1)) / step.masked_fill(step == 0, 1)).round()
    numbers = numbers.clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        low, high = numbers.chunk(2, dim=-1)
        numbers = low | (high << 4)
    meaning = torch.stack([scale16, least16], dim=-1).flatten(-2).contiguous().view(torch.uint8)
    return Grouped(torch.cat([numbers.flatten(-2), meaning], dim=-1).contiguous(), bits, group)


def numbers_of(grouped: Grouped) -> Int[Tensor, "*stack O groups group"]:
    """The stored numbers, group by group."""
    packed = grouped.rows[..., : grouped.inputs * grouped.bits // 8]
    if grouped.bits == 8:
        return packed.unflatten(-1, (-1, grouped.group)).long()
    halves = packed.unflatten(-1, (-1, grouped.group // 2))
    return torch.cat([halves & 15, halves >> 4], dim=-1).long()


def restore(grouped: Grouped, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*stack O I"]:
    """The weights that the numbers stand for."""
    meaning = grouped.rows[..., grouped.inputs * grouped.bits // 8 :].contiguous().view(torch.float16)
    scale, least = meaning.unflatten(-1, (-1, 2)).float().unbind(dim=-1)
    groups = numbers_of(grouped).float() * scale.unsqueeze(-1) + least.unsqueeze(-1)
    return groups.flatten(-2).to(dtype)
