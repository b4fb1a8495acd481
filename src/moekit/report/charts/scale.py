"""From values to places on an axis, with round ticks; and numbers as text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from moekit.report.series import LARGEST


@dataclass(frozen=True, slots=True)
class Axis:
    """The interval of an axis and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies, from 0 at the low end to 1; values outside are moved to the nearer end."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            value = math.log10(value) if value > 0 else low
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)


def drawable(value: float, log: bool = False) -> bool:
    """Whether an axis has a place for the value."""
    return math.isfinite(value) and abs(value) < LARGEST and (not log or value > 1 / LARGEST)


def linear_axis(values: Iterable[float], *, zero: bool = False, outward: bool = True, n_ticks: int = 5) -> Axis:
    """An axis over the values; `outward` extends it to ticks at both ends, `zero` to 0."""
    known = [value for value in values if drawable(value)] + ([0.0] if zero else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * largest, 1 / LARGEST):
        margin = 0.1 * largest if largest > 1 / LARGEST else 1.0
        low, high = (low if zero else low - margin), high + margin
    step = _round_step((high - low) / max(n_ticks - 1, 1))
    first = math.floor(low / step + 1e-9) if outward else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if outward else math.floor(high / step + 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks) if outward else Axis(low, high, ticks)


def step_axis(steps: Iterable[float]) -> Axis:
    """An axis from the first step to the last, with ticks at whole numbers."""
    known = sorted({step for step in steps if drawable(step)}) or [0.0]
    if len(known) == 1 and abs(known[0]) < 1e15:
        return Axis(known[0] - 1, known[0] + 1, (known[0],))
    axis = linear_axis(known, outward=False)
    return Axis(axis.low, axis.high, tuple(tick for tick in axis.ticks if round(tick, 6) == round(tick)))


def log_axis(values: Iterable[float]) -> Axis:
    """A logarithmic axis over the values above 0, with ticks at 1, 2 and 5 of a decade, or at decades."""
    known = [value for value in values if drawable(value, log=True)] or [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    every = max((high - low) // 5, 1)
    digits = (1, 2, 5) if high - low <= 2 else (1,)
    candidates = [digit * 10.0**decade for decade in range(low, high + every + 1, every) for digit in digits]
    below = [tick for tick in candidates if tick <= min(known) * (1 + 1e-9)]
    above = [tick for tick in candidates if tick >= max(known) * (1 - 1e-9) and tick > below[-1]]
    ticks = tuple(tick for tick in candidates if below[-1] <= tick <= above[0])
    return Axis(ticks[0], ticks[-1], ticks, log=True)


def tick_text(value: float, axis: Axis) -> str:
    """A tick with as many decimals as tell it from its neighbours."""
    if value == 0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        return f"{value:.3g}"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 if unit == "M" else 10):
            return f"{value / size:.4g}{unit}"
    if axis.log:
        return f"{value:g}"
    if value == round(value) and len(axis.ticks) == 1:
        return f"{value:.0f}"
    steps = [b - a for a, b in pairwise(axis.ticks)]
    decimals = next((d for d in range(5) if abs(round(steps[0], d) - steps[0]) < steps[0] * 1e-6), 5) if steps else 3
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def number(value: float | int, digits: int = 3) -> str:
    """`value` with `digits` significant digits, a dash where it is not finite; whole numbers in full."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif abs(value) >= 1e7 or abs(value) < 1e-4:
        text = f"{value:.{digits - 1}e}"
    else:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if text.startswith("-") else text


def fixed(value: float | int, decimals: int) -> str:
    """`value` with so many decimals, for columns; a dash where it is not finite."""
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") if math.isfinite(value) else "\N{EN DASH}"


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= step * (1 - 1e-9)), 10 * power)
