"""Tables of figures, and the frame of a figure: question, answer, drawing, numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from moekit.report.charts.scale import number
from moekit.report.charts.svg import escape
from moekit.report.series import Series, evenly


class Html(NamedTuple):
    """Text that is markup already and must not be escaped again."""

    markup: str


Cell = str | float | int | Html


def table(head: Sequence[Cell], rows: Sequence[Sequence[Cell]], *, foot: Sequence[Cell] = (), kind: str = "") -> str:
    """Numbers to the right, text to the left; the first cell of a row names it."""
    lines = "".join(_row(row) for row in rows)
    last = f"<tfoot>{_row(foot)}</tfoot>" if foot else ""
    heads = "".join(f'<th scope="col">{_content(cell)}</th>' for cell in head)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody>{last}</table></div>"
    )


def figure(question: str, answer: str, drawing: str, numbers: str = "") -> str:
    """A figure captioned by the question it answers; `answer`, `drawing` and `numbers` are markup."""
    details = f"<details><summary>Numbers</summary>{numbers}</details>" if numbers else ""
    return f"<figure><figcaption><h3>{escape(question)}</h3><p>{answer}</p></figcaption>{drawing}{details}</figure>"


def curve_table(lines: Sequence[Series]) -> str:
    """The series side by side at some steps of the longest; report.json has more of them."""
    longest = max(lines, key=lambda series: len(series.steps))
    steps = [longest.steps[i] for i in evenly(len(longest.steps))]
    at = [dict(zip(series.steps, series.values, strict=True)) for series in lines]
    rows = [[number(step), *(values.get(step, "") for values in at)] for step in steps]
    return table(["step", *(series.name for series in lines)], rows)


def _row(row: Sequence[Cell]) -> str:
    first, *rest = row
    return f'<tr><th scope="row">{_content(first)}</th>' + "".join(_cell(cell) for cell in rest) + "</tr>"


def _cell(cell: Cell) -> str:
    kind = ' class="number"' if isinstance(cell, float | int) else ""
    return f"<td{kind}>{_content(cell)}</td>"


def _content(cell: Cell) -> str:
    if isinstance(cell, Html):
        return cell.markup
    return escape(cell) if isinstance(cell, str) else number(cell, 4)
