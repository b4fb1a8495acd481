"""Rotary positions in both layouts, and YaRN (arXiv 2104.09864, 2309.00071)."""

import math
from typing import Literal, NamedTuple

import torch

from moekit.config.model import RopeConfig, YarnConfig
from moekit.tensors import Float, Int, Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each position, for half the rotary width."""

    cos: Float[Tensor, "*positions half"]
    sin: Float[Tensor, "*positions half"]
    layout: Literal["half", "interleaved"]


def rotation(config: RopeConfig, width: int, positions: Int[Tensor, "*positions"]) -> Rotation:
    """The rotation of each position for rotary vectors of `width`, in float32."""
    angles = positions.unsqueeze(-1).float() * frequencies(config, width, positions.device)
    factor = 1.0
    if config.scaling is not None:
        yarn = config.scaling
        factor = temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)
    return Rotation(angles.cos() * factor, angles.sin() * factor, config.layout)


def rotate(x: Float[Tensor, "B H S C"], by: Rotation) -> Float[Tensor, "B H S C"]:
    """Turn each pair of dimensions by its angle. The result is in half order whatever the layout of `x`.

    Products of two rotated vectors do not depend on the order; caches of both layouts must not be mixed.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if by.layout == "interleaved" else x.chunk(2, dim=-1)
    cos, sin = by.cos.unsqueeze(-3).to(x.dtype), by.sin.unsqueeze(-3).to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax_factor(config: RopeConfig) -> float:
    """What YaRN multiplies the softmax scale by: its temperature, squared. Missing it spoils long contexts silently."""
    yarn = config.scaling
    return 1.0 if yarn is None else temperature(yarn.factor, yarn.mscale_all_dim) ** 2


def temperature(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1; DeepSeek-V2 and V3 at factor 40: 1.2608 (0.707) and 1.3689 (1.0)."""
    return 1.0 if factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(config: RopeConfig, width: int, device: torch.device) -> Float[Tensor, " half"]:
    """Radians per position of each pair of dimensions."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    plain = 1.0 / config.theta**exponent
    return plain if config.scaling is None else _yarn(plain, config.scaling, config.theta, width)


def _yarn(plain: Float[Tensor, " half"], yarn: YarnConfig, theta: float, width: int) -> Float[Tensor, " half"]:
    """Keep fast frequencies, divide slow ones by the factor, ramp linearly between."""

    def dimension_of(rotations: float) -> float:
        turns = yarn.original_max_positions / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_of(yarn.beta_slow)), width - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32, device=plain.device) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return plain / yarn.factor * slow + plain * (1 - slow)
