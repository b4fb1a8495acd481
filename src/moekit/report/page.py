"""One self-contained HTML page: readable without network or script, in light, dark and print."""

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
    style = resources.files("moekit.report").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(report.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{_facts(report)}
</header>
<main>
{_main(report)}
</main>
<footer><p>Written by moekit. The file report.json holds the same numbers.</p></footer>
</body>
</html>
"""


def _facts(report: Report) -> str:
    if not report.facts:
        return ""
    pairs = (f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in report.facts)
    return f'<dl class="facts">{"".join(pairs)}</dl>'


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
