"""FP8 block by block and number by number, straight from the definition."""

import math

import torch
from torch import Tensor

E4M3 = sorted({m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)})[:-1]
"""All magnitudes: subnormals, then four bits of exponent; the last pattern means "not a number"."""


def nearest(value: float) -> float:
    """The E4M3 number next to `value`, at most 448; of two as near, the one with an even mantissa."""
    magnitude = min(abs(value), E4M3[-1])
    index = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - magnitude), i % 2))
    return math.copysign(E4M3[index], value)


def rounded(part: Tensor) -> tuple[Tensor, Tensor]:
    """One block or group: its values as E4M3 numbers, and its scale."""
    largest = part.abs().max()
    scale = largest / 448 if largest > 0 else torch.tensor(1.0)
    values = [nearest(value) for value in (part / scale).flatten().tolist()]
    return torch.tensor(values).view(part.shape), scale


def blocks(weight: Tensor, rows: int = 128, columns: int = 128) -> tuple[Tensor, Tensor]:
    """A matrix's values and scales, [out in] and [ceil(out / rows) ceil(in / columns)]."""
    out, width = weight.shape
    values = torch.empty(out, width)
    scales = torch.empty(-(-out // rows), -(-width // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            values[place], scales[i, j] = rounded(weight[place])
    return values, scales


def product(values: Tensor, scales: Tensor, rows: int = 128, columns: int = 128) -> Tensor:
    """Each value times the scale of its block, in float32."""
    weight = torch.empty(values.shape)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            weight[i, j] = values[i, j].float() * scales[i // rows, j // columns]
    return weight
