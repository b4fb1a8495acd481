"""What the page of a sweep is made of: plain values, ready to be drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moekit.report.series import Series


class Estimate(NamedTuple):
    """The mean over seeds; `spread` is half its 95 % interval, None for one seed."""

    mean: float
    spread: float | None
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantResult:
    """One configuration over its seeds."""

    name: str
    seeds: tuple[int, ...]
    """those whose runs are finished"""
    causal: bool
    """whether its loss can be compared: its routing does not look at later tokens"""
    figures: Mapping[str, Estimate]
    """by the names of the figures of a run"""
    difference: Estimate | None
    """of the loss to that of the first variant with the same seed; None for the first and where it means nothing"""
    max_violation: Series
    """of each step: mean over layers and seeds"""
    loss: Series
    """of each step, in training: mean over seeds"""
    sets: Mapping[str, str]
    """what it sets, by dotted key"""
    about: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """All that the page shows."""

    title: str
    facts: Sequence[tuple[str, str]]
    variants: Sequence[VariantResult]
