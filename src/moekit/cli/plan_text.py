"""What `moekit plan` prints for a reader: tables, notes, and formulas where they are asked for."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from moekit.cli.console import show_table
from moekit.plan.blueprint import PARTS
from moekit.plan.figure import Section
from moekit.plan.headlines import Comparison, summary
from moekit.plan.words import brief, labelled, words

WIDTH = 120


def show_section(section: Section) -> None:
    """The headlines of the section as a table, and what it assumes."""
    short = summary(section)
    by_part = list(part_rows(section))
    if by_part:
        show_table(section.title, ("part", "stored", "share", "active for a token"), by_part)
    rows = [(label, words(figure)) for label, figure in labelled(short.figures)]
    if rows:
        show_table("in all" if by_part else section.title, ("figure", "value"), rows)
    else:
        print(section.title)
    show_notes((*short.sentences, *section.notes))


def explain_section(section: Section) -> None:
    """Every figure with its formula, the numbers in it, and its note below it."""
    print(section.title)
    for label, figure in labelled(section.figures):
        print(f"  {label}: {words(figure)}")
        for sign, text in (("= ", figure.formula), ("= ", figure.numbers), ("", figure.note)):
            for line in _wrapped(text, f"      {sign}", "        "):
                print(line)
    show_notes(section.notes)


def show_comparison(comparison: Comparison) -> None:
    """The models as columns."""
    rows = [
        (row.label, *("" if figure is None else brief(figure) for figure in row.figures)) for row in comparison.rows
    ]
    show_table("side by side", ("figure", *comparison.names), rows)


def part_rows(section: Section) -> Iterator[tuple[str, str, str, str]]:
    """Part, what is stored of it, its share, and what a token uses; nothing for sections that do not count parts."""
    values: dict[str, Any] = {figure.key: figure.value for figure in section.figures}
    total, used = values.get("stored.total"), values.get("active.all")
    if section.key != "parameters" or not total:
        return
    for part in PARTS:
        stored, active = values.get(f"stored.{part}"), values.get(f"active_by_part.{part}", 0)
        if stored is not None:
            yield part, f"{stored:,}", f"{stored / total:.1%}", f"{active:,}"
    yield "all", f"{total:,}", "100.0%", f"{used:,}"


def show_notes(notes: Iterable[str]) -> None:
    """Remarks below a table."""
    for note in notes:
        for line in _wrapped(note, "- ", "  "):
            print(line)
    print()


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
