"""Charts as strings of inline SVG: fluid in width, fixed in height, text in its own size at any width."""

from moekit.report.charts.bars import load_bars
from moekit.report.charts.dots import Mark, dot_strip, mark_key
from moekit.report.charts.heat import heat_key, heat_map
from moekit.report.charts.lines import line_chart

__all__ = ["Mark", "dot_strip", "heat_key", "heat_map", "line_chart", "load_bars", "mark_key"]
