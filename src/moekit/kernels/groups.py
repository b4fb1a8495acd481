"""Matrices of 8- or 4-bit numbers in groups: how they are made, how they lie in memory and on disk, what they mean.

A row of a matrix [out, in] with groups of g numbers is, byte after byte: for each group scale and least value in
float16, then all its numbers. With 8 bits a number is a byte; with 4 bits byte j of a group holds number j in its low
half and number j + g/2 in its high half. A weight is scale * number + least: 4 in/g + in or 4 in/g + in/2 bytes a row.
What numbers mean comes before them because a product wants it first, and memory is read fastest in order. The format
is the same on every machine.
"""

from typing import NamedTuple

import torch
from jaxtyping import UInt8

from moekit.kernels.library import library
from moekit.tensors import Float, Tensor

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
        return numbers_in(self.rows.shape[-1], self.bits, self.group)


def row_bytes(inputs: int, bits: int, group: int) -> int:
    """Bytes of a row of `inputs` numbers."""
    return inputs * bits // 8 + inputs // group * 4


def numbers_in(length: int, bits: int, group: int) -> int:
    """Numbers in a row of `length` bytes: `row_bytes` the other way."""
    return length * 8 * group // (bits * group + 32)


def quantise(weight: Float[Tensor, "*stack O I"], bits: int, group: int) -> Grouped:
    """Round each group to 2^bits equally spaced values from its least to its greatest.

    |w - restored| is at most half a step, (greatest - least) / (2^bits - 1) / 2, and what float16 adds: one part in
    2048 of |least| and of the group's span, and 2^-25 (2^bits + 1), since it knows no finer numbers than 2^-24. Where
    the least or the step exceed its 65504, what is restored is not finite. Raises ValueError where groups do not divide
    a row.
    """
    if bits not in BITS or group not in GROUPS or weight.shape[-1] % group:
        raise ValueError(f"no groups of {group} numbers of {bits} bits in rows of {weight.shape[-1]}")
    compiled = library()
    if compiled is None or compiled.moekit_level() < 1 or weight.device.type != "cpu":
        return quantise_twin(weight, bits, group)
    source = (weight if weight.dtype == torch.bfloat16 else weight.float()).contiguous()
    inputs = weight.shape[-1]
    rows = torch.empty(*weight.shape[:-1], row_bytes(inputs, bits, group), dtype=torch.uint8)
    shape = (int(source.dtype == torch.float32), weight.shape[:-1].numel(), inputs, bits, group)
    compiled.moekit_quantise(source.data_ptr(), *shape, rows.data_ptr(), torch.get_num_threads(), 1)
    return Grouped(rows, bits, group)


def quantise_twin(weight: Float[Tensor, "*stack O I"], bits: int, group: int) -> Grouped:
    """As `quantise`, in plain torch."""
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
    return Grouped(torch.cat([meaning, numbers.flatten(-2)], dim=-1).contiguous(), bits, group)


def restore(grouped: Grouped, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*stack O I"]:
    """The weights that the numbers stand for."""
    weights = numbers_of(grouped).unflatten(-1, (-1, grouped.group)).float()
    scale, least = meaning_of(grouped)
    return weights.mul_(scale.unsqueeze(-1)).add_(least.unsqueeze(-1)).flatten(-2).to(dtype)


def numbers_of(grouped: Grouped) -> UInt8[Tensor, "*stack O I"]:
    """The numbers of a matrix in their order."""
    packed = grouped.rows[..., _meaning_bytes(grouped) :]
    if grouped.bits == 8:
        return packed
    halves = packed.unflatten(-1, (-1, grouped.group // 2))
    return torch.cat([halves & 15, halves >> 4], dim=-1).flatten(-2)


def meaning_of(grouped: Grouped) -> tuple[Float[Tensor, "*stack O groups"], Float[Tensor, "*stack O groups"]]:
    """Scale and least value of each group, in float32."""
    meaning = grouped.rows[..., : _meaning_bytes(grouped)].contiguous().view(torch.float16)
    scale, least = meaning.unflatten(-1, (-1, 2)).float().unbind(dim=-1)
    return scale, least


def finite(grouped: Grouped) -> bool:
    """Whether every scale and every least value is a finite number."""
    meaning = grouped.rows[..., : _meaning_bytes(grouped)].contiguous().view(torch.int16)
    return not bool((meaning & 0x7C00 == 0x7C00).any())


def _meaning_bytes(grouped: Grouped) -> int:
    """Bytes of a row before its numbers."""
    return grouped.inputs // grouped.group * 4
