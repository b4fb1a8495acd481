"""The load of every expert: one strip of bars for each layer, all on one scale, with the mean as a line."""

from collections.abc import Sequence

from moekit.report.charts.heat import expert_ticks
from moekit.report.charts.scale import number
from moekit.report.charts.svg import escape, frame, label, percent, room_for

HEIGHT = 44

KEY = "Load of each expert. Dashed: the mean of the layer. Cross: no load at all."


def load_bars(rows: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """Each row is a layer's name, the load of its experts, and a remark for its right end."""
    ratios = [_over_mean(load) for _, load, _ in rows]
    top = max([1.0, *(ratio for row in ratios for ratio in row)])
    left = max(12 + room_for(name for name, _, _ in rows), 54)
    right = 12 + room_for((remark for _, _, remark in rows), 6.6)
    parts = []
    for index, ((name, load, remark), ratio) in enumerate(zip(rows, ratios, strict=True)):
        last = index == len(rows) - 1
        inside = (
            f'<text class="name end" x="-10" y="{HEIGHT - 2}">{label(name)}</text>'
            + "".join(_bar(i, len(load), load[i], ratio[i] / top, ratio[i]) for i in range(len(load)))
            + _mean_line(1 / top)
            + f'<text class="note" x="100%" dx="8" y="{HEIGHT - 2}">{escape(remark)}</text>'
            + (expert_ticks(len(load), HEIGHT) if last else "")
        )
        pad = (6, right, 22 if last else 4, left)
        parts.append(frame(inside, height=HEIGHT, pad=pad, about=f"load of the experts of {name}"))
    return f'<p class="legend">{KEY}</p><div class="stack">{"".join(parts)}</div>'


def _over_mean(load: Sequence[int]) -> list[float]:
    mean = sum(load) / max(len(load), 1)
    return [value / mean if mean else 0.0 for value in load]


def _bar(index: int, n: int, load: int, height: float, ratio: float) -> str:
    gap = 0.18 if n <= 128 else 0.0
    tip = f"<title>expert {index}: {number(load)} slots, {number(ratio)} times the mean</title>"
    if load == 0:
        # An expert that starves is a mark, not the absence of one.
        place = percent((index + 0.5) / n)
        return (
            f'<svg class="over" x="{place}" width="1" height="{HEIGHT}">'
            f'<path class="dead" d="M-3 {HEIGHT - 8}l6 6m0 -6l-6 6"/>{tip}</svg>'
        )
    tall = max(HEIGHT * height, 0.5)
    return (
        f'<rect class="bar" x="{percent((index + gap / 2) / n)}" width="{percent((1 - gap) / n)}" '
        f'y="{HEIGHT - tall:.1f}" height="{tall:.1f}">{tip}</rect>'
    )


def _mean_line(place: float) -> str:
    at = HEIGHT * (1 - place)
    return f'<line class="mean" x1="0" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>'
