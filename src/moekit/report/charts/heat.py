"""A heat map of domains by experts: the deeper the colour, the larger the share of a domain's tokens."""

from collections.abc import Sequence

from moekit.report.charts.scale import number
from moekit.report.charts.svg import frame, label, percent, room_for

ROW = 18


def heat_map(
    title: str, remark: str, names: Sequence[str], shares: Sequence[Sequence[float]], top: float, last: bool
) -> str:
    """One row of cells for each name; `top` is the share drawn in full colour, the `last` map has ticks."""
    n, height = max((len(row) for row in shares), default=0), ROW * len(names)
    cells = "".join(
        _cell(row, column, n, share, top, f"{name}, expert {column}: {number(100 * share)} % of tokens")
        for row, name in enumerate(names)
        for column, share in enumerate(shares[row])
    )
    rows = "".join(
        f'<text class="name end" x="-10" y="{ROW * row + 13}">{label(name)}</text>' for row, name in enumerate(names)
    )
    left = max(12 + room_for(names), 54)
    head = f'<text class="unit" x="0" y="-7">{label(title)} · {label(remark, 60)}</text>'
    inside = head + rows + cells + (expert_ticks(n, height) if last else "")
    return frame(
        inside, height=height, pad=(26, 16, 22 if last else 2, left), about=f"share of tokens by expert, {title}"
    )


def heat_key(uniform: float, top: float) -> str:
    """What the colours mean, from no token to the largest share, with the share of uniform routing marked."""
    steps = 24
    cells = "".join(_cell(0, i, steps, (i + 0.5) / steps, 1.0, "") for i in range(steps))
    at = min(uniform / top, 1.0) if top > 0 else 0.0
    place, side = percent(at), "end" if at > 0.5 else "start"
    inside = (
        f'{cells}<line class="mean" x1="{place}" x2="{place}" y1="-4" y2="{ROW + 4}"/>'
        f'<text class="tick {side}" x="{place}" y="{ROW + 18}">{number(100 * uniform)} % if all were alike</text>'
        f'<text class="tick end" x="-8" y="13">0</text>'
        f'<text class="tick" x="100%" dx="8" y="13">{number(100 * top)} %</text>'
    )
    drawn = frame(inside, height=ROW, pad=(12, 64, 24, 20), about="scale of the colours")
    return f'<div class="key">{drawn}</div>'


def expert_ticks(n: int, height: int) -> str:
    """Numbers of some experts under their columns."""
    every = next((step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n / step <= 9), 512)
    numbers = "".join(
        f'<text class="tick middle" x="{percent((i + 0.5) / n)}" y="{height + 15}">{i}</text>'
        for i in range(0, n, every)
    )
    return f'<text class="tick end" x="-10" y="{height + 15}">expert</text>{numbers}'


def _cell(row: int, column: int, n: int, share: float, top: float, tip: str) -> str:
    depth = min(max(share / top, 0.0), 1.0) if top > 0 else 0.0
    gap = 0.06 if n <= 128 else 0.0
    return (
        f'<rect class="cell" x="{percent(column / n)}" width="{percent((1 - gap) / n)}" y="{ROW * row + 0.5}" '
        f'height="{ROW - 1}" fill-opacity="{0.05 + 0.95 * depth:.3f}">'
        + (f"<title>{label(tip, 200)}</title>" if tip else "")
        + "</rect>"
    )
