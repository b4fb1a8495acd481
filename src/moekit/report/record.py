"""The content of a report as plain data for report.json."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moekit.report.curves import curves
from moekit.report.series import Series, thin
from moekit.report.values import Report, average


def to_json(report: Report) -> dict[str, Any]:
    """What the page shows, as dicts, lists and scalars. A number that is not finite becomes none."""
    run = curves(report.metrics)
    rows = [dataclasses.asdict(row) for row in report.compression]
    mean = dataclasses.asdict(average(report.compression)) if rows else None
    data = {
        "title": report.title,
        "facts": [{"label": label, "value": value} for label, value in report.facts],
        "compression": {"domains": rows, "average": mean},
        "training": {
            "rows": len(report.metrics),
            **{field.name: _series(getattr(run, field.name)) for field in dataclasses.fields(run)},
        },
        "experts": None if report.experts is None else dataclasses.asdict(report.experts),
        "samples": [dataclasses.asdict(sample) for sample in report.samples],
    }
    return _plain(data)


def _series(series: Series | tuple[Series, ...]) -> Any:
    if isinstance(series, tuple):
        return [_series(one) for one in series]
    return dataclasses.asdict(thin(series))


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity, and no tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
