"""The page of a plan: tables of its figures, what the parameters and the memory are made of, every formula."""

from collections.abc import Sequence
from typing import NamedTuple

from moekit.plan.blueprint import PARTS
from moekit.plan.figure import Figure, Section
from moekit.plan.headlines import Comparison, side_by_side, summary
from moekit.plan.words import brief, labelled, scaled, short, words
from moekit.report.charts.stacks import Segment, Stack, stacked_bars
from moekit.report.charts.svg import escape
from moekit.report.page import document
from moekit.report.tables import Cell, figure, table


class PlannedModel(NamedTuple):
    """A model with the facts a reader wants first (label and text), and all that was found out about it."""

    name: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def render_plan(title: str, models: Sequence[PlannedModel]) -> str:
    """The page as text, to be written as UTF-8: one model in full, or several side by side."""
    first = models[0]
    note = "Written by moekit. With --json, moekit plan prints the same numbers."
    if len(models) == 1:
        main = "\n".join(_chapter(section) for section in first.sections)
        return document(title, first.facts, main, note, ["plan_page.css"])
    comparison = side_by_side([(model.name, model.sections) for model in models])
    shared = [fact for fact in first.facts if all(fact in model.facts for model in models)]
    main = f"<section><h2>Side by side</h2>{_stored_bars(models)}{_active_bars(models)}{_columns(comparison)}</section>"
    return document(title, shared, main, note, ["plan_page.css"])


def _chapter(section: Section) -> str:
    drawing = {"parameters": _parameter_figure, "memory": _memory_figure, "fit": _fit_figure}.get(section.key)
    short = summary(section)
    rows: list[list[Cell]] = [[label, words(each)] for label, each in labelled(short.figures)]
    listed = table(["figure", "value"], rows, kind="figures") if rows else ""
    said = short.sentences if drawing is not _fit_figure else ()
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*said, *section.notes))
    return (
        f"<section><h2>{escape(section.title)}</h2>{drawing(section) if drawing is not None else ''}"
        f"<figure>{listed}{_explained(section.figures)}</figure>"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + "</section>"
    )


def _explained(figures: Sequence[Figure]) -> str:
    """Each figure with its formula, the numbers in it, and its note."""
    entries = []
    for label, each in labelled(figures):
        lines = [f"<dd><code>= {escape(text)}</code></dd>" for text in (each.formula, each.numbers) if text]
        lines += [f"<dd>{escape(each.note)}</dd>"] if each.note else []
        entries.append(f"<dt>{escape(label)}: {escape(words(each))}</dt>{''.join(lines)}")
    if not entries:
        return ""
    return (
        f'<details><summary>All figures and formulas</summary><dl class="explained">{"".join(entries)}</dl></details>'
    )


def _parameter_figure(section: Section) -> str:
    stored, active = _parts(section, "stored"), _parts(section, "active_by_part")
    total, used = sum(stored.values()), sum(active.values())
    if not total or not used:
        return ""
    rows: list[list[Cell]] = [
        [part, count, f"{count / total:.1%}", active.get(part, 0)] for part, count in stored.items()
    ]
    foot: list[Cell] = ["all", total, "100.0%", used]
    answer = (
        f"<strong>{short(total)}</strong> parameters are stored; a token uses <strong>{short(used)}</strong> of them. "
        "The last bar enlarges what it uses."
    )
    bars = _bars(
        [_stack("stored", stored), _stack("active", active), _stack("enlarged", active)._replace(enlarged=True)]
    )
    parts = table(["part", "stored", "share", "active"], rows, foot=foot, kind="figures")
    return figure("What is it made of?", answer, bars + parts)


def _memory_figure(section: Section) -> str:
    """Inference: what is loaded by part, the cache, and the working set."""
    values = {each.key: each.value for each in section.figures}
    parts = {part: size for part, size in _parts(section, "weights").items() if part != "prediction"}
    others = {"cache": values.get("kv_cache"), "working set": values.get("working_set.prompt")}
    parts |= {name: size for name, size in others.items() if isinstance(size, int)}
    if not parts:
        return ""
    bars = stacked_bars([_bytes_stack("inference", parts)], "memory by part")
    return figure("What takes the memory?", "Weights by part, the cache, and what computing a prompt adds.", bars)


def _fit_figure(section: Section) -> str:
    """One device: what it would hold, below what it may."""
    values = {each.key: each.value for each in section.figures}
    names = {
        "weights": "needs.weights",
        "cache": "needs.cache",
        "logits": "needs.logits",
        "working set": "needs.working_set",
    }
    needs = {name: size for name, key in names.items() if isinstance(size := values.get(key), int)}
    usable = values.get("usable")
    if not needs or not isinstance(usable, int):
        return ""
    stacks = [_bytes_stack("a device needs", needs), _bytes_stack("it may hold", {"usable": usable})]
    answer = ("Yes. " if values.get("fits") else "No. ") + " ".join(summary(section).sentences)
    return figure("Does it fit?", escape(answer), stacked_bars(stacks, "memory of a device"))


def _bytes_stack(name: str, parts: dict[str, int]) -> Stack:
    segments = [Segment(part, size, scaled(size, "B", "bytes")) for part, size in parts.items()]
    return Stack(name, scaled(sum(parts.values()), "B", "bytes"), segments)


def _stored_bars(models: Sequence[PlannedModel]) -> str:
    stacks = [_stack(model.name, _parts(_parameters(model), "stored")) for model in models]
    return figure("How much do they store?", "Parameters by part, on one scale.", _bars(stacks))


def _active_bars(models: Sequence[PlannedModel]) -> str:
    stacks = [_stack(model.name, _parts(_parameters(model), "active_by_part")) for model in models]
    return figure("How much does a token use?", "Active parameters by part, on a scale of their own.", _bars(stacks))


def _columns(comparison: Comparison) -> str:
    rows: list[list[Cell]] = [
        [row.label, *("" if each is None else brief(each) for each in row.figures)] for row in comparison.rows
    ]
    return f"<figure>{table(['figure', *comparison.names], rows, kind='figures')}</figure>"


def _parameters(model: PlannedModel) -> Section:
    return next(section for section in model.sections if section.key == "parameters")


def _parts(section: Section, place: str) -> dict[str, int]:
    """The values of the figures `place`.<part>, in the order of PARTS."""
    values = {each.key: each.value for each in section.figures}
    found = {part: values.get(f"{place}.{part}") for part in PARTS}
    return {part: count for part, count in found.items() if isinstance(count, int)}


def _stack(name: str, parts: dict[str, int]) -> Stack:
    segments = [Segment(part, count, f"{count:,}") for part, count in parts.items()]
    return Stack(name, short(sum(parts.values())), segments)


def _bars(stacks: Sequence[Stack]) -> str:
    return stacked_bars(stacks, "parameters by part")
