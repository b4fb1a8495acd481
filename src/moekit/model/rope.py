"""Rotary positions in both layouts, and their scalings for longer contexts (arXiv 2104.09864, 2309.00071)."""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from moekit.config.model import LinearConfig, Llama3Config, RopeConfig, YarnConfig
from moekit.kernels.one_query import Turn
from moekit.tensors import Float, Int, Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each position, for half the rotary width."""

    cos: Float[Tensor, "*positions half"]
    sin: Float[Tensor, "*positions half"]
    layout: Literal["half", "interleaved"]


def rotation(config: RopeConfig, width: int, positions: Int[Tensor, "*positions"]) -> Rotation:
    """The rotation of each position for rotary vectors of `width`, in float32."""
    angles = positions.unsqueeze(-1).float() * frequencies(config, width, positions.device)
    factor = rotation_factor(config)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(cos, sin, config.layout) if factor == 1 else Rotation(cos * factor, sin * factor, config.layout)


def rotate(x: Float[Tensor, "B H S C"], by: Rotation) -> Float[Tensor, "B H S C"]:
    """Turn each pair of dimensions by its angle. The result is in half order whatever the layout of `x`.

    Products of two rotated vectors do not depend on the order; caches of both layouts must not be mixed.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if by.layout == "interleaved" else x.chunk(2, dim=-1)
    cos, sin = by.cos.unsqueeze(-3).to(x.dtype), by.sin.unsqueeze(-3).to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turn(by: Rotation) -> Turn:
    """The rotation of one new token in each sequence, as compiled attention takes it."""
    half = by.cos.shape[-1]
    return Turn(by.cos.view(-1, half), by.sin.view(-1, half), by.layout == "interleaved")


@torch.inference_mode(False)
def room_for_turn(config: RopeConfig, width: int) -> Turn:
    """Room for the rotation of one place of all sequences."""
    return Turn(torch.empty(1, width // 2), torch.empty(1, width // 2), config.layout == "interleaved")


def turn_at(position: int, config: RopeConfig, found: Turn) -> None:
    """Put the rotation of a place into `found`, to the bit as `rotation` has it."""
    angles = frequencies(config, 2 * found.cos.shape[-1], found.cos.device) * position
    factor = rotation_factor(config)
    for function, own in ((torch.cos, found.cos[0]), (torch.sin, found.sin[0])):
        function(angles, out=own)
        if factor != 1:
            own.mul_(factor)


def rotation_factor(config: RopeConfig) -> float:
    """What YaRN multiplies cosines and sines by."""
    yarn = config.scaling
    if not isinstance(yarn, YarnConfig):
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)


def softmax_factor(config: RopeConfig) -> float:
    """What YaRN multiplies the softmax scale of latent attention by: its temperature, squared.

    Missing it spoils long contexts silently. Models with grouped-query attention never had it.
    """
    yarn = config.scaling
    return temperature(yarn.factor, yarn.mscale_all_dim) ** 2 if isinstance(yarn, YarnConfig) else 1.0


def temperature(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1; DeepSeek-V2 and V3 at factor 40: 1.2608 (0.707) and 1.3689 (1.0)."""
    return 1.0 if factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(factor) + 1.0


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def frequencies(config: RopeConfig, width: int, device: torch.device) -> Float[Tensor, " half"]:
    """Radians per position of each pair of dimensions, not to be written to."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    plain = 1.0 / config.theta**exponent
    match config.scaling:
        case None:
            return plain
        case LinearConfig(factor=factor):
            return plain / factor
        case Llama3Config() as llama:
            return _llama3(plain, llama)
        case YarnConfig() as yarn:
            return _yarn(plain, yarn, config.theta, width)


def _llama3(plain: Float[Tensor, " half"], llama: Llama3Config) -> Float[Tensor, " half"]:
    """Keep frequencies that turn often over the original context, divide those that hardly turn, ramp between."""
    turns = llama.original_max_positions * plain / (2 * math.pi)
    kept = ((turns - llama.low_freq_factor) / (llama.high_freq_factor - llama.low_freq_factor)).clamp(0, 1)
    return plain / llama.factor * (1 - kept) + plain * kept


def _yarn(plain: Float[Tensor, " half"], yarn: YarnConfig, theta: float, width: int) -> Float[Tensor, " half"]:
    """Keep fast frequencies, divide slow ones by the factor, ramp linearly between."""

    def dimension_of(rotations: float) -> float:
        turns = yarn.original_max_positions / (rotations * 2 * math.pi)
        return width * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # The published code divides by 0.001 where the ramp has no length.
    length = high - low or 0.001
    slow = ((torch.arange(len(plain), dtype=torch.float32, device=plain.device) - low) / length).clamp(0, 1)
    return plain / yarn.factor * slow + plain * (1 - slow)
