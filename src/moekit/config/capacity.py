"""How many tokens an expert or device serves at most, and what becomes of the others."""

from dataclasses import dataclass
from typing import Literal

from moekit.config.errors import check, check_positive

Drop = Literal["position", "probability", "batch_priority", "random"]
"""Whom an expert turns away: the last (first choices before second ones), those of the lowest weight, the tokens whose
best weight is lowest (first choices before second ones: V-MoE, arXiv 2106.05974), or anyone (outside training the last,
so that evaluation has one result)."""

Dropped = Literal["shared", "residual", "next_best"]
"""What a token keeps whose every expert is full: the shared experts, nothing but the residual stream, or its next best
experts with room."""


class CapacityConfig:
    """What every capacity tells without torch."""

    __slots__ = ()

    def state_size(self, n_choices: int) -> int:  # noqa: ARG002
        """Numbers that a layer keeps for it, of `n_choices` experts."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCapacity(CapacityConfig):
    """Each expert serves ceil(factor x top_k x tokens / experts) places (arXiv 2101.03961, eq 3)."""

    kind: Literal["expert"] = "expert"
    factor: float = 1.25
    """room, relative to an equal share"""
    scope: Literal["batch", "sequence"] = "batch"
    """tokens among which it is counted: those of a forward pass, or of each sequence (GShard's groups)"""
    drop: Drop = "position"
    """whom a full expert turns away: the last, the lowest weight, the least important tokens, or anyone"""
    dropped: Dropped = "shared"
    """what a token keeps whose every expert is full: shared experts, the residual alone, or next best experts"""
    in_evaluation: bool = False
    """drop outside training too"""

    def __post_init__(self) -> None:
        check_positive(self, "factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicCapacity(CapacityConfig):
    """As `expert`, with a factor for each expert that shrinks while the expert is idle and grows while it overflows."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float = 1.25
    """room at the start, relative to an equal share"""
    low: float = 0.5
    """average use of its room below which an expert's factor shrinks"""
    high: float = 1.5
    """average use of its room above which an expert's factor grows"""
    shrink: float = 0.8
    """by how much"""
    grow: float = 1.2
    """by how much"""
    smallest: float = 0.5
    """least factor"""
    largest: float = 4.0
    """greatest factor"""
    decay: float = 0.9
    """of the average use, at each step"""
    drop: Drop = "position"
    """whom a full expert turns away: the last, the lowest weight, the least important tokens, or anyone"""
    dropped: Dropped = "shared"
    """what a token keeps whose every expert is full: shared experts, the residual alone, or next best experts"""
    in_evaluation: bool = False
    """drop outside training too"""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "low", "high", "shrink", "grow", "smallest", "largest")
        check(self.low <= self.high, "low", f"{self.low} exceeds high = {self.high}")
        check(self.shrink <= 1, "shrink", f"{self.shrink} must be at most 1")
        check(self.grow >= 1, "grow", f"{self.grow} must be at least 1")
        inside = self.smallest <= self.factor <= self.largest
        check(inside, "factor", f"{self.factor} lies outside {self.smallest} to {self.largest}")
        check(0 <= self.decay < 1, "decay", f"{self.decay} must lie between 0 and 1")

    def state_size(self, n_choices: int) -> int:
        return 2 * n_choices


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCapacity(CapacityConfig):
    """Each device serves ceil(factor x top_k x tokens / devices) places, the weightiest (arXiv 2405.04434, 2.2.4)."""

    kind: Literal["device"] = "device"
    factor: float = 1.0
    """room, relative to an equal share"""
    n_devices: int = 1
    """devices that share the routed experts, in order and evenly"""
    protected: float = 0.1
    """share of the sequences that are never dropped"""
    dropped: Literal["shared", "residual"] = "shared"
    """what a token keeps whose every place is dropped: shared experts, or the residual alone"""
    in_evaluation: bool = False
    """drop outside training too"""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "n_devices")
        check(0 <= self.protected <= 1, "protected", f"{self.protected} must lie between 0 and 1")


Capacity = ExpertCapacity | DynamicCapacity | DeviceCapacity
