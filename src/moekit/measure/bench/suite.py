"""All works by name, and how they are run one after the other."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moekit.measure.bench import generation, granularity, layer, model, quantised_layer, share
from moekit.measure.bench.host import Host, this_host
from moekit.measure.bench.row import Row, as_json
from moekit.measure.bench.setting import FULL, QUICK, Setting
from moekit.measure.bench.shapes import full_sizes, quick_sizes

Work = Callable[[Setting], Iterator[Row]]

WORKS: MappingProxyType[str, Work] = MappingProxyType(
    {
        "layer-train": layer.training,
        "layer-train-routing": share.routing_share,
        "model-train": model.training,
        "experts-train": granularity.training,
        "layer-prefill": layer.prefill,
        "layer-prefill-int4": quantised_layer.prefill,
        "model-prefill-int4": generation.prefill,
        "layer-decode": layer.decode,
        "layer-decode-int4": quantised_layer.decode,
        "model-decode-int4": generation.decode,
        "experts-decode": granularity.decode,
        "generate-start-int4": generation.start,
    }
)
"""Name of a work: what does it. `names.py` sorts them; the names of their rows begin with theirs."""


class Result(NamedTuple):
    """The machine, and what it did."""

    host: Host
    rows: tuple[Row, ...]

    def as_json(self) -> dict[str, Any]:
        """What scripts read; these names stay."""
        return {"host": self.host.as_json(), "rows": [as_json(row) for row in self.rows]}


def bench(works: Iterable[str], peers: Iterable[str], quick: bool, say: Callable[[str], None]) -> Result:
    """Measure `works` (see WORKS) beside `peers`, which must be installed. `quick` takes shapes that mean nothing."""
    with tempfile.TemporaryDirectory(prefix="moekit-bench-") as folder:
        sizes, pace = (quick_sizes(), QUICK) if quick else (full_sizes(), FULL)
        setting = Setting(sizes, pace, frozenset(peers), Path(folder), say)
        say("measuring the machine's limits")
        host, rows = this_host(setting), list[Row]()
        for name in works:
            say(f"measuring {name}")
            rows += WORKS[name](setting)
    return Result(host, tuple(rows))
