"""A strip of marks on one scale, for the last column of a table: what lies where, told by shape."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from moekit.report.charts.scale import Axis
from moekit.report.charts.svg import escape, percent

Shape = Literal["disc", "ring", "diamond", "tick"]

OUTLINES: dict[Shape, str] = {
    "disc": '<circle class="mark full" cx="{x}" cy="{y}" r="5"/>',
    "ring": '<circle class="mark" cx="{x}" cy="{y}" r="4.5"/>',
    "diamond": '<path class="mark" d="M{x} {y}m0 -6l5.5 6l-5.5 6l-5.5 -6z"/>',
    "tick": '<path class="mark" d="M{x} {y}m0 -6v12"/>',
}

HEIGHT = 20


class Mark(NamedTuple):
    """A value and how it is drawn."""

    value: float
    shape: Shape
    name: str


def dot_strip(marks: Sequence[Mark], axis: Axis) -> str:
    """The marks on a hairline; what is not finite is left out."""
    known = [mark for mark in marks if math.isfinite(mark.value)]
    drawn = "".join(
        f'<svg x="{percent(axis.place(mark.value))}" width="1" height="{HEIGHT}" class="over">'
        f"{_outline(mark.shape, 0)}<title>{escape(mark.name)}</title></svg>"
        for mark in reversed(known)
    )
    middle = HEIGHT / 2
    names = ", ".join(mark.name for mark in known)
    return (
        f'<svg class="strip" role="img" aria-label="{escape(names)}" width="100%" height="{HEIGHT}">'
        f'<line class="grid" x1="0" x2="100%" y1="{middle}" y2="{middle}"/>{drawn}</svg>'
    )


def mark_key(shape: Shape) -> str:
    """The mark alone, to stand before its name."""
    return f'<svg class="sample" aria-hidden="true" width="14" height="14">{_outline(shape, 7)}</svg>'


def _outline(shape: Shape, centre: int) -> str:
    return OUTLINES[shape].format(x=centre, y=centre or HEIGHT // 2)
