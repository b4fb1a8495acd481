"""A quantity over the steps of a run: picked from rows, smoothed, and thinned for drawing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 600
"""Most points of a series on the page: about one per pixel."""

ROWS = 24
"""Most rows of a table of curves."""

LARGEST = 1e100
"""Beyond it a value counts as infinite: sums and axes could not be computed in floats."""


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
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def thin(series: Series, points: int = POINTS) -> Series:
    """At most `points` of the points, all of them real: `evenly` spread ones, and the extremes of each stretch.

    So no spike is lost, and what a table shows is among them.
    """
    n = len(series.values)
    if n <= points:
        return series
    rows = min(ROWS, points // 2)
    kept = set(evenly(n, rows))
    for stretch in np.array_split(np.arange(n), (points - rows) // 2):
        values = np.array([series.values[i] for i in stretch], dtype=float)
        known = np.isfinite(values)
        if known.any():
            lowest, highest = np.where(known, values, np.inf).argmin(), np.where(known, values, -np.inf).argmax()
            kept |= {int(stretch[lowest]), int(stretch[highest])}
        else:
            kept.add(int(stretch[0]))
    order = sorted(kept)
    return Series(series.name, [series.steps[i] for i in order], [series.values[i] for i in order])


def evenly(n: int, places: int = ROWS) -> list[int]:
    """At most `places` indices below `n` at even distances, the first and the last among them."""
    return list(dict.fromkeys(round(i * (n - 1) / (places - 1)) for i in range(places))) if n > places else [*range(n)]


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
