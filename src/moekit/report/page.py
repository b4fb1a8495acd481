"""One self-contained HTML page: readable without network or script, in light, dark and print."""

from collections.abc import Iterable, Sequence
from importlib import resources

from moekit.report.charts.svg import escape
from moekit.report.curves import curves
from moekit.report.expert_figures import divergence_figure, load_figure
from moekit.report.headline import headline
from moekit.report.run_figures import run_figures
from moekit.report.samples import samples
from moekit.report.values import Report

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Tells the browser itself that the page needs nothing from elsewhere."""


def render(report: Report) -> str:
    """The page as text, to be written as UTF-8."""
    note = "Written by moekit. The file report.json holds the same numbers."
    return document(report.title, report.facts, _main(report), note)


def document(title: str, facts: Iterable[tuple[str, str]], main: str, note: str, sheets: Sequence[str] = ()) -> str:
    """A page under `title`: labels and values, the markup `main`, a last line; `sheets` are further style sheets."""
    files = (resources.files("moekit.report").joinpath(name) for name in ("page.css", *sheets))
    style = "".join(file.read_text(encoding="utf-8") for file in files)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_facts(facts)}
</header>
<main>
{main}
</main>
<footer><p>{escape(note)}</p></footer>
</body>
</html>
"""


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    pairs = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{pairs}</dl>' if pairs else ""


def _main(report: Report) -> str:
    experts = report.experts if report.experts is not None and report.experts.layers else None
    chapters = [
        ("How well it compresses", [headline(report.compression)] if report.compression else []),
        ("How it learned", run_figures(curves(report.metrics))),
        ("What its experts do", [load_figure(experts), divergence_figure(experts)] if experts else []),
        ("What it writes", [samples(report.samples)] if report.samples else []),
    ]
    shown = [(name, parts) for name, parts in chapters if parts]
    if not shown:
        return "<p>There is nothing to show yet.</p>"
    return "\n".join(f"<section><h2>{name}</h2>\n{chr(10).join(parts)}</section>" for name, parts in shown)
