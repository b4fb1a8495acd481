"""One self-contained HTML page about a run, and the same content as plain data. Knows no torch."""

from moekit.report.page import render
from moekit.report.record import to_json
from moekit.report.values import Compression, ExpertLayer, ExpertUse, Report, Sample

__all__ = ["Compression", "ExpertLayer", "ExpertUse", "Report", "Sample", "render", "to_json"]
