"""Rotary positions in both layouts, pair by pair, and YaRN by its formulas."""

import cmath
import math

import torch
from torch import Tensor


def frequencies(theta: float, width: int) -> list[float]:
    """theta_j = base^(-2j / d) (arXiv 2104.09864, eq 15)."""
    return [theta ** (-2 * j / width) for j in range(width // 2)]


def yarn_frequencies(
    theta: float, width: int, factor: float, original: int, beta_fast: float, beta_slow: float
) -> list[float]:
    """arXiv 2309.00071, eqs 19-23, with the ramp over whole dimensions as DeepSeek's code draws it."""

    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns this many times over the original context."""
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(beta_fast)), 0)
    last = min(math.ceil(dimension(beta_slow)), width - 1)
    found = []
    for j, plain in enumerate(frequencies(theta, width)):
        interpolated = min(max((j - first) / (last - first), 0.0), 1.0)
        found.append(plain / factor * interpolated + plain * (1 - interpolated))
    return found


def llama3_frequencies(theta: float, width: int, factor: float, original: int, low: float, high: float) -> list[float]:
    """Wavelength by wavelength, as Meta's code for Llama 3.1 draws it."""
    found = []
    for plain in frequencies(theta, width):
        wavelength = 2 * math.pi / plain
        if wavelength < original / high:
            found.append(plain)
        elif wavelength > original / low:
            found.append(plain / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append((1 - smooth) * plain / factor + smooth * plain)
    return found


def pairs(width: int, layout: str) -> list[tuple[int, int]]:
    """Which two dimensions turn together."""
    half = width // 2
    return [(j, j + half) if layout == "half" else (2 * j, 2 * j + 1) for j in range(half)]


def rotated(x: Tensor, position: int, turns: list[float], layout: str) -> Tensor:
    """One vector at one position: each pair, taken as a complex number, times exp(i * position * frequency)."""
    out = torch.empty_like(x)
    for (first, second), frequency in zip(pairs(len(x), layout), turns, strict=True):
        turned = complex(x[first], x[second]) * cmath.exp(1j * position * frequency)
        out[first], out[second] = turned.real, turned.imag
    return out
