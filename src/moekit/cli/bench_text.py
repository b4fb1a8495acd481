"""What `moekit bench` shows a reader: a table, what was done in each of its rows, and a page to keep."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moekit.measure.bench.host import Host
from moekit.measure.bench.row import Row, Value
from moekit.measure.bench.suite import Result
from moekit.measure.peers.installed import install_command

UNSTEADY = 0.2
"""Of the median: from where on a reader is told how far the middle half of the timings ranges."""

COLUMNS = ("work", "unit", "moekit", "best peer", "moekit / peer", "limit", "moekit / limit")


def table(result: Result) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of text."""
    return COLUMNS, [_cells(row) for row in result.rows]


def lines(result: Result) -> Iterator[str]:
    """What was done in each row, further figures, and the machine."""
    for row in result.rows:
        yield f"{row.work}: {_explained(row)}"
    yield machine(result.host)


def markdown(result: Result, absent: tuple[str, ...]) -> str:
    """The page to keep."""
    host = result.host
    told = [f"{name} {version}" for name, version in host.versions.items()]
    told += [f"{peer}: not installed ({install_command(peer)})" for peer in absent]
    rows = [COLUMNS, ("---", "---", *["---:"] * 5), *(_cells(row) for row in result.rows)]
    pages = [
        f"# {host.date}, {host.cpu}",
        machine(host),
        "\n".join(f"- {each}" for each in told),
        "\n".join(f"| {' | '.join(cells)} |" for cells in rows),
        "\n".join(f"- `{row.work}`: {_explained(row)}" for row in result.rows),
        "All variants that were measured:",
        "\n".join(f"- `{row.work}`: {_variants(row)}" for row in result.rows if row.peers),
    ]
    return "\n\n".join(pages) + "\n"


def write(folder: Path, result: Result, absent: tuple[str, ...], printed: Mapping[str, object]) -> Path:
    """Put the page and what scripts read into `folder`; returns the place of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(result.host)
    (folder / f"{name}.json").write_text(json.dumps(printed, indent=1, allow_nan=False) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(markdown(result, absent), "utf-8")
    return folder / f"{name}.md"


def file_name(host: Host) -> str:
    """Day and processor, without an ending."""
    cpu = re.sub(r"[^a-z0-9]+", "-", host.cpu.lower()).strip("-") or "unknown"
    return f"{host.date}-{cpu}"


def machine(host: Host) -> str:
    """The machine in one line."""
    limits = "; ".join(f"{name} {number(value)} {_limit_unit(name)}" for name, value in host.limits.items())
    return (
        f"{host.cpu} ({' '.join(host.flags) or 'no known vector instructions'}), threads: {host.threads} on "
        f"{host.cores} cores, {host.memory_bytes / 2**30:.0f} GiB, compiled code: {host.kernels}; {limits}"
    )


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cells(row: Row) -> tuple[str, ...]:
    unit = f"{row.unit} (less is better)" if row.less_is_better else row.unit
    to_peer = "" if row.to_peer is None else f"{row.to_peer:.2f}"
    to_limit = "" if row.to_limit is None else f"{row.to_limit:.1%}"
    return row.work, unit, number(row.moekit), _named(row.peer), to_peer, _named(row.limit), to_limit


def _named(value: Value | None) -> str:
    return "" if value is None else f"{number(value.value)} {value.name}"


def _explained(row: Row) -> str:
    further = [f"{name} {number(value)}" for name, value in row.details.items()]
    further += [f"{name} was unsteady ({value:.0%})" for name, value in row.spread.items() if value > UNSTEADY]
    return "; ".join([row.label, *further])


def _variants(row: Row) -> str:
    return ", ".join(f"{peer.name} {number(peer.value)}" for peer in row.peers) + f" {row.unit}"


def _limit_unit(name: str) -> str:
    return "GFLOP/s" if name.startswith("dense") else "GB/s"
