"""A line chart of several series over the steps of a run, each line named at its end."""

from collections.abc import Sequence
from itertools import pairwise

from moekit.report.charts.scale import Axis, drawable, linear_axis, log_axis, number, step_axis, tick_text
from moekit.report.charts.svg import colour, dash, escape, frame, label, percent, room_for
from moekit.report.series import Series

LABEL_GAP = 16.0
FEW = 30
"""Up to so many points, each gets a dot of its own."""


def line_chart(
    lines: Sequence[Series],
    *,
    behind: Sequence[Series] = (),
    unit: str,
    log: bool = False,
    zero: bool = False,
    height: int = 220,
) -> str:
    """`lines` over steps; `behind[i]`, if given, is drawn faintly under `lines[i]`: the values it was smoothed from."""
    height = max(height, int(LABEL_GAP) * len(lines) + 8)
    shown = [*lines, *behind]
    values = [value for series in shown for value in series.values]
    x = step_axis([step for series in shown for step in series.steps])
    y = log_axis(values) if log else linear_axis(values, zero=zero)
    named = len(lines) > 1
    paths = "".join(_path(series, x, y, height, i, "raw") for i, series in enumerate(behind))
    paths += "".join(_path(series, x, y, height, i, "line") for i, series in enumerate(lines))
    inside = (
        _grid(x, y, height, unit)
        + f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none">{paths}</svg>'
        + "".join(_dots(series, x, y, height, i) for i, series in enumerate(lines) if len(series.values) <= FEW)
        + (_names(lines, y, height) if named else "")
    )
    right = 40 + room_for(series.name for series in lines) if named else 16
    about = f"{', '.join(series.name for series in lines)}: {unit} over steps"
    return frame(inside, height=height, pad=(26, right, 24, 46), about=about)


def _grid(x: Axis, y: Axis, height: int, unit: str) -> str:
    parts = [f'<text class="unit" x="-46" y="-14">{escape(unit)}{" (log scale)" if y.log else ""}</text>']
    for tick in y.ticks:
        at = round(height * (1 - y.place(tick)), 1)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="-8" y="{at + 4}">{tick_text(tick, y)}</text>')
    parts.append(f'<text class="tick end" x="-20" y="{height + 18}">step</text>')
    for tick in x.ticks:
        at = percent(x.place(tick))
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{height}" y2="{height + 4}"/>')
        parts.append(f'<text class="tick middle" x="{at}" y="{height + 18}">{tick_text(tick, x)}</text>')
    return "".join(parts)


def _path(series: Series, x: Axis, y: Axis, height: int, index: int, kind: str) -> str:
    """The line, broken where a value has no place."""
    commands, pen = [], "M"
    for step, value in zip(series.steps, series.values, strict=True):
        if not (drawable(value, y.log) and drawable(step)):
            pen = "M"
            continue
        commands.append(f"{pen}{1000 * x.place(step):.1f} {height * (1 - y.place(value)):.1f}")
        # A point alone between two gaps still shows: a line of no length has round ends.
        commands.append("h0" if pen == "M" else "")
        pen = "L"
    pattern = dash(index) if kind == "line" else ""
    return f'<path class="{kind} {colour(index)}"{pattern} d="{"".join(commands)}"/>'


def _dots(series: Series, x: Axis, y: Axis, height: int, index: int) -> str:
    return "".join(
        f'<circle class="dot {colour(index)}" cx="{percent(x.place(step))}" '
        f'cy="{height * (1 - y.place(value)):.1f}" r="2.5">'
        f"<title>{escape(series.name)}, step {number(step)}: {number(value, 4)}</title></circle>"
        for step, value in zip(series.steps, series.values, strict=True)
        if drawable(value, y.log) and drawable(step)
    )


def _names(lines: Sequence[Series], y: Axis, height: int) -> str:
    """Names beside the ends of the lines, moved apart where lines end close together."""
    ends = []
    for series in lines:
        last = next((value for value in reversed(series.values) if drawable(value, y.log)), y.low)
        ends.append(height * (1 - y.place(last)))
    parts = []
    for index, at in enumerate(spread(ends, LABEL_GAP, 4.0, height - 4.0)):
        parts.append(f'<path class="line {colour(index)}"{dash(index)} d="M4 {ends[index]:.1f}L12 {at:.1f}H28"/>')
        parts.append(f'<text class="name" x="32" y="{at + 4:.1f}">{label(lines[index].name)}</text>')
    return f'<svg x="100%" width="1" height="{height}">{"".join(parts)}</svg>'


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved as little as needed to stand `gap` apart between `low` and `high`, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [min(max(place, low), high) for place in places]
    for before, i in pairwise(order):
        moved[i] = max(moved[i], moved[before] + gap)
    ceiling = high
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved
