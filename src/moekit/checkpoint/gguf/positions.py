"""Rotary positions as llama.cpp reads them: YaRN's temperatures, and which rows of a matrix turn together."""

import math
from typing import Any, Literal

import torch

from moekit.config.errors import check
from moekit.config.model import LinearConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.model.rope import frequencies, rotation_factor, temperature
from moekit.tensors import Tensor

Layout = Literal["half", "interleaved"]

FACTORS = "rope_freqs.weight"
"""The tensor that llama.cpp divides frequencies by."""


def scaling_fields(config: ModelConfig) -> dict[str, Any]:
    """The keys of a longer context, without the name of the architecture."""
    scaling, latent = config.rope.scaling, isinstance(config.attention, MLAConfig)
    match scaling:
        case LinearConfig(factor=factor):
            fields = {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
            # Without YaRN, latent attention still multiplies the scores by (t(1) t(L))^2, as below.
            return fields | _multiplier(factor, 1 / _temperature(factor)) if latent else fields
        case YarnConfig() as yarn:
            return _yarn_fields(yarn, rotation_factor(config.rope), latent)
        case _:
            return {}


def _yarn_fields(yarn: YarnConfig, cosines: float, latent: bool) -> dict[str, Any]:
    """With t(m) = 0.1 m ln(factor) + 1, llama.cpp multiplies cosines and sines by a t(1), where a is its attn_factor.

    Its latent attention multiplies scores by (a t(1))^2; or, where a multiplier L is given, cosines and sines by a and
    scores by (a t(L))^2. Ours multiplies scores by t(mscale_all_dim)^2.
    """
    fields = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original_max_positions,
    }
    scores = temperature(yarn.factor, yarn.mscale_all_dim) if latent else cosines
    if scores == cosines:
        return fields | {"rope.scaling.attn_factor": cosines / temperature(yarn.factor, 1.0)}
    return fields | {"rope.scaling.attn_factor": cosines} | _multiplier(yarn.factor, scores / cosines)


def _temperature(factor: float) -> float:
    """t(1) as latent attention takes it, also for factors below one."""
    return 0.1 * math.log(factor) + 1


def _multiplier(factor: float, temperature_of_scores: float) -> dict[str, Any]:
    """The L for which t(L) is this; the file holds a tenth of it (the DeepSeek-V2 converter's legacy)."""
    if temperature_of_scores == 1:
        return {}
    check(factor != 1, "rope.scaling.factor", "llama.cpp has no temperature of the scores where the factor is 1")
    return {"rope.scaling.yarn_log_multiplier": (temperature_of_scores - 1) / math.log(factor)}


def rope_factors(rope: RopeConfig, width: int) -> Tensor:
    """By how much each pair of dimensions turns more slowly than without scaling, [width / 2]."""
    cpu = torch.device("cpu")
    return frequencies(RopeConfig(theta=rope.theta, layout=rope.layout), width, cpu) / frequencies(rope, width, cpu)


def turn_rows(rows: Tensor, width: int, ours: Layout, theirs: Layout) -> Tensor:
    """The rows [heads * width, ...] with the dimensions of each head in the order of the other layout."""
    if ours == theirs:
        return rows
    order = torch.arange(width, device=rows.device)
    # Interleaved pairs are (2i, 2i + 1), half pairs (i, i + width / 2).
    order = order.view(2, -1).T if theirs == "interleaved" else order.view(-1, 2).T
    return rows.unflatten(0, (-1, width))[:, order.flatten()].flatten(0, 1)


def turn_last_rows(rows: Tensor, head: int, rotary: int, ours: Layout, theirs: Layout) -> Tensor:
    """As `turn_rows`, for the last `rotary` of the `head` dimensions of each head."""
    still, turning = rows.unflatten(0, (-1, head)).split([head - rotary, rotary], dim=1)
    turned = turn_rows(turning.flatten(0, 1), rotary, ours, theirs)
    return torch.cat([still, turned.unflatten(0, (-1, rotary))], dim=1).flatten(0, 1)
