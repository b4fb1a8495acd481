"""The headline: bits per byte of each domain beside gzip and xz."""

import math
from collections.abc import Sequence

from moekit.report.charts import Mark, dot_strip, mark_key
from moekit.report.charts.dots import Shape
from moekit.report.charts.scale import Axis, fixed, linear_axis, number, tick_text
from moekit.report.tables import Cell, Html, figure, table
from moekit.report.values import Compression, average

READERS: tuple[tuple[str, str, Shape], ...] = (
    ("bits_per_byte", "this model", "disc"),
    ("gzip", "gzip -9", "ring"),
    ("xz", "xz -9", "diamond"),
)


def headline(rows: Sequence[Compression]) -> str:
    """A table with a row for each domain and their average."""
    shown = [reader for reader in READERS if any(math.isfinite(getattr(row, reader[0])) for row in rows)]
    shown = shown or [READERS[0]]
    axis = linear_axis((getattr(row, key) for row in rows for key, _, _ in shown), zero=True)
    scale = f"0 to {tick_text(axis.high, axis)} bits per byte"
    names: list[Cell] = [Html(f"{mark_key(shape)}{name}") for _, name, shape in shown]
    mean = average(rows)
    body = table(
        ["held-out text", *names, Html(f'<span class="scale">{scale}</span>')],
        [_row(row, shown, axis) for row in rows],
        foot=_row(mean, shown, axis) if len(rows) > 1 else (),
        kind="headline",
    )
    return figure("How many bits does a byte of unseen text need?", _answer(mean), body)


def _row(row: Compression, shown: Sequence[tuple[str, str, Shape]], axis: Axis) -> list[Cell]:
    values = [getattr(row, key) for key, _, _ in shown]
    marks = [
        Mark(value, shape, f"{name}: {fixed(value, 3)}") for value, (_, name, shape) in zip(values, shown, strict=True)
    ]
    figures = [Html(f'<span class="number">{fixed(value, 3)}</span>') for value in values]
    return [row.domain, *figures, Html(dot_strip(marks, axis))]


def _answer(mean: Compression) -> str:
    parts = [f"<strong>{fixed(mean.bits_per_byte, 3)}</strong> on average"]
    for value, name in ((mean.gzip, "gzip"), (mean.xz, "xz")):
        if math.isfinite(value) and value > 0 and math.isfinite(mean.bits_per_byte):
            parts.append(f"{number(100 * mean.bits_per_byte / value)} % of what {name} needs")
    return ", ".join(parts) + ". Fewer is better; an uncompressed byte has 8."
