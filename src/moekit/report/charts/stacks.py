"""Horizontal bars made of parts, all on one scale: what is large, and what it is made of."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from moekit.report.charts.svg import cells, escape, frame, label, percent

HEIGHT = 30

GAP = 12

LONGEST_NAME = 22

NAMED_FROM = 0.2
"""A part's share of the width from which its name fits inside."""


class Segment(NamedTuple):
    """A part of a bar: `name` is the same in every bar, `text` says its value."""

    name: str
    value: float | int
    text: str


class Stack(NamedTuple):
    """One bar: its parts from left to right, and the value of the whole in words; `enlarged` fills the width."""

    name: str
    value: str
    segments: Sequence[Segment]
    enlarged: bool = False


def stacked_bars(stacks: Sequence[Stack], about: str) -> str:
    """The bars below one another, with a key; all but those enlarged are on one scale.

    The colour of a part is that of the style sheet's class `part-NAME`, with hyphens for spaces.
    """
    longest = max((_total(stack) for stack in stacks if not stack.enlarged), default=0.0) or 1.0
    left = 14 + max((round(min(cells(text), LONGEST_NAME) * 7.0) for s in stacks for text in s[:2]), default=0)
    inside = "".join(_bar(stack, index, longest) for index, stack in enumerate(stacks))
    height = len(stacks) * (HEIGHT + GAP) - GAP
    names = dict.fromkeys(part.name for stack in stacks for part in stack.segments if part.value > 0)
    key = "".join(f"<li>{_swatch(name)}{escape(name)}</li>" for name in names)
    return frame(inside, height=height, pad=(4, 4, 8, left), about=about) + f'<ul class="parts">{key}</ul>'


def _bar(stack: Stack, index: int, longest: float) -> str:
    top, start, drawn = index * (HEIGHT + GAP), 0.0, list[str]()
    longest = (_total(stack) or 1.0) if stack.enlarged else longest
    for part in stack.segments:
        share = part.value / longest
        tip = f"<title>{escape(part.name)}: {escape(part.text)}</title>"
        place = f'x="{percent(start)}" width="{percent(share)}" y="{top}" height="{HEIGHT}"'
        drawn.append(f'<rect class="part {_colour(part.name)}" {place}>{tip}</rect>')
        if share >= NAMED_FROM:
            middle = percent(start + share / 2)
            drawn.append(f'<text class="inside middle" x="{middle}" y="{top + 19}">{escape(part.name)}</text>')
        start += share
    name = f'<text class="name end" x="-10" y="{top + 12}">{label(stack.name, LONGEST_NAME)}</text>'
    value = f'<text class="end" x="-10" y="{top + 27}">{escape(stack.value)}</text>'
    return name + value + "".join(drawn)


def _total(stack: Stack) -> float:
    return float(sum(part.value for part in stack.segments))


def _swatch(name: str) -> str:
    square = f'<rect class="part {_colour(name)}" width="10" height="10"/>'
    return f'<svg class="sample" aria-hidden="true" width="10" height="10">{square}</svg>'


def _colour(name: str) -> str:
    return "part-" + "-".join(re.findall(r"\w+", name))
