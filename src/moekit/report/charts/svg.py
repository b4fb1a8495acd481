"""Pieces of SVG, and text that is safe inside a page."""

import html
import unicodedata
from collections.abc import Iterable

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters, as the pictures Unicode has of them: HTML may not hold the characters themselves."""

COLOURS = 8
"""Colours of series in page.css; each has a dash of its own, so that no line is told by colour alone."""

DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "12 3", "1 3", "9 3 2 3 2 3")


def escape(text: str) -> str:
    """User text as HTML text or attribute value."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return html.escape(whole.translate(CONTROLS))


def cells(text: str) -> int:
    """Width of `text` in Latin letters; East Asian ones take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def shorten(text: str, width: int = 16) -> str:
    """`text` cut to `width` Latin letters."""
    if cells(text) <= width:
        return text
    while cells(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def room_for(texts: Iterable[str], pixels: float = 7.2) -> int:
    """Pixels the longest of the texts takes in a chart."""
    return round(max((cells(shorten(text)) for text in texts), default=0) * pixels)


def percent(place: float) -> str:
    """A place from 0 to 1 as an SVG length."""
    return f"{100 * place:.2f}".rstrip("0").rstrip(".") + "%"


def colour(index: int) -> str:
    """Class of the series' colour."""
    return f"s{index % COLOURS}"


def dash(index: int) -> str:
    """The series' dash pattern as an attribute."""
    pattern = DASHES[(index + index // len(DASHES)) % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def label(text: str, width: int = 16) -> str:
    """Text content of a label: cut to `width`, with the whole as its tooltip."""
    short = shorten(text, width)
    return escape(short) + (f"<title>{escape(text)}</title>" if short != text else "")


def frame(inside: str, *, height: int, pad: tuple[int, int, int, int], about: str) -> str:
    """A plot of `height` pixels and any width; `pad` is the room around it for labels: top, right, bottom, left."""
    top, right, bottom, left = pad
    return (
        f'<div class="chart" style="padding:{top}px {right}px {bottom}px {left}px">'
        f'<svg role="img" aria-label="{escape(about)}" width="100%" height="{height}">{inside}</svg></div>'
    )
