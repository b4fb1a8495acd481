"""All works by name, and how they are run one after the other."""

import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from moekit.config.errors import InputError
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
    with _terminable() as leave_if_told, tempfile.TemporaryDirectory(prefix="moekit-bench-") as folder:
        sizes, pace = (quick_sizes(), QUICK) if quick else (full_sizes(), FULL)
        setting = Setting(sizes, pace, frozenset(peers), Path(folder), say)
        say("measuring the machine's limits")
        host, rows = this_host(setting), list[Row]()
        for name in works:
            say(f"measuring {name}")
            rows += measured(name, setting)
            leave_if_told()
    return Result(host, tuple(rows))


def measured(name: str, setting: Setting) -> tuple[Row, ...]:
    """The rows of a work; without peers where one of them fails: what was measured until then must not be lost."""
    try:
        return tuple(WORKS[name](setting))
    except Exception as error:
        if not setting.peers or isinstance(error, InputError):
            raise
        setting.say(f"{name}: a peer failed ({error}); measuring it without peers")
        return tuple(WORKS[name](setting._replace(peers=frozenset())))


@contextmanager
def _terminable() -> Iterator[Callable[[], None]]:
    """A request to end is an exit like any other, so that folders and processes are cleared away.

    Python drops an exit that begins while an object is finalised; who calls what is given leaves then.
    """
    told = list[int]()

    def leave_if_told() -> None:
        if told:
            sys.exit(128 + told[0])

    def leave(number: int, _frame: object) -> None:
        told.append(number)
        leave_if_told()

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield leave_if_told
    finally:
        signal.signal(signal.SIGTERM, before)
