"""Means with their intervals and the single values behind them, one below the other on a common scale."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moekit.report.charts.scale import Axis, linear_axis, tick_text
from moekit.report.charts.svg import escape, frame, label, percent, room_for

ROW = 26


class Whisker(NamedTuple):
    """One row: a mean, half its interval or None, single values; `apart` draws what cannot be compared as a ring."""

    name: str
    mean: float
    spread: float | None
    values: Sequence[float]
    apart: bool
    text: str
    """the tooltip"""


def whisker_chart(rows: Sequence[Whisker], unit: str, *, zero: bool = False) -> str:
    """A dot for each mean, a line over its interval, a small dot for each value.

    A dashed line marks the first row's mean, or with `zero` the 0.
    """
    ends = [row.mean + side * (row.spread or 0) for row in rows for side in (-1, 1)]
    axis = linear_axis([*ends, *(value for row in rows for value in row.values)], zero=zero)
    height = ROW * len(rows)
    base = 0.0 if zero else rows[0].mean
    at = percent(axis.place(base))
    inside = (
        _grid(axis, height, unit)
        + (f'<line class="mean" x1="{at}" x2="{at}" y1="0" y2="{height}"/>' if math.isfinite(base) else "")
        + "".join(_row(row, axis, ROW * number + ROW / 2) for number, row in enumerate(rows))
    )
    about = f"{unit}: {', '.join(row.text for row in rows)}"
    return frame(inside, height=height, pad=(8, 16, 42, 16 + room_for(row.name for row in rows)), about=about)


def _grid(axis: Axis, height: int, unit: str) -> str:
    parts = [f'<text class="unit end" x="100%" y="{height + 36}">{escape(unit)}</text>']
    for tick in axis.ticks:
        at = percent(axis.place(tick))
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{height + 4}"/>')
        parts.append(f'<text class="tick middle" x="{at}" y="{height + 18}">{tick_text(tick, axis)}</text>')
    return "".join(parts)


def _row(row: Whisker, axis: Axis, middle: float) -> str:
    parts = [f'<text class="name end" x="-14" y="{middle + 4}">{label(row.name)}</text>']
    if row.spread is not None:
        low, high = (percent(axis.place(row.mean + side * row.spread)) for side in (-1, 1))
        parts.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle}" y2="{middle}"/>')
        parts += [
            f'<line class="whisker" x1="{end}" x2="{end}" y1="{middle - 4}" y2="{middle + 4}"/>' for end in (low, high)
        ]
    if len(row.values) > 1:
        parts += [
            f'<circle class="single" cx="{percent(axis.place(value))}" cy="{middle}" r="2.5"/>' for value in row.values
        ]
    kind = "mark" if row.apart else "mark full"
    parts.append(
        f'<circle class="{kind}" cx="{percent(axis.place(row.mean))}" cy="{middle}" r="5">'
        f"<title>{escape(row.text)}</title></circle>"
    )
    return "".join(parts)
