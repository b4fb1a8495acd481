"""A quantity over the steps of a run: picked from rows, smoothed, and thinned for drawing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 600
"""Most points of a series on the page: about one per pixel."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values at steps; a value that is not finite is a gap."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]

    @property
    def finite(self) -> list[float]:
        """The values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]

    @property
    def last(self) -> float:
        """The value at the last step; NaN for an empty series."""
        return self.values[-1] if self.values else math.nan


def pick(name: str, rows: Iterable[Mapping[str, Any]], *keys: str) -> Series:
    """The value found under nested `keys` in each row that has it."""
    steps, values = [], []
    for row in rows:
        value = look_up(row, keys)
        if value is not None:
            steps.append(number_of(row.get("step", len(steps))))
            values.append(value)
    return Series(name, steps, values)


def look_up(row: Any, keys: Sequence[str]) -> float | None:
    """The number at the end of the path `keys`, or none."""
    for key in keys:
        if not isinstance(row, Mapping) or key not in row:
            return None
        row = row[key]
    return None if row is None else number_of(row)


def number_of(value: Any) -> float:
    """A float of whatever a metrics row holds; NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def thin(series: Series, points: int = POINTS) -> Series:
    """At most `points` of the points, all of them real: the lowest and highest of each stretch, so no spike is lost."""
    n = len(series.values)
    if n <= points:
        return series
    kept = {0, n - 1}
    for stretch in np.array_split(np.arange(1, n - 1), max((points - 2) // 2, 1)):
        values = np.array([series.values[i] for i in stretch], dtype=float)
        if np.isfinite(values).any():
            kept |= {int(stretch[np.nanargmin(_finite(values))]), int(stretch[np.nanargmax(_finite(values))])}
        else:
            kept.add(int(stretch[0]))
    order = sorted(kept)
    return Series(series.name, [series.steps[i] for i in order], [series.values[i] for i in order])


def smooth(series: Series, share: float = 0.04) -> Series:
    """A centred moving mean over a `share` of the points; what is not finite is passed over."""
    values = np.array(series.values, dtype=float)
    half = int(len(values) * share / 2)
    if half == 0:
        return series
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    # The window shrinks towards both ends, where a one-sided mean would lag behind a falling curve; but not to one
    # point, which would end the curve in its noise.
    reach = np.clip(np.minimum(at, at[::-1]), half // 3, half)
    first, end = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    n = count[end] - count[first]
    means = np.where(n > 0, (total[end] - total[first]) / np.maximum(n, 1), np.nan)
    return Series(series.name, series.steps, means.tolist())


def tail_means(series: Series, share: float = 0.1) -> tuple[float, float] | None:
    """Means of the last `share` of the finite values and of as many before them; none for a short series."""
    values = series.finite
    n = int(len(values) * share)
    if n == 0:
        return None
    return float(np.mean(values[-n:])), float(np.mean(values[-2 * n : -n]))


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
