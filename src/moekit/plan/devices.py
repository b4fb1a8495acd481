"""Machines as a planner sees them: memory, bandwidth, rates, links; from a table that users can extend."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moekit.config.codec import update
from moekit.config.errors import ConfigError, InputError, check, check_not_negative, check_positive
from moekit.config.presets.load import read_toml

GIGA = 10**9
TERA = 10**12


class Device(NamedTuple):
    """One accelerator, or one computer's processors.

    `memory` in bytes, as vendors sell it (decimal); `bandwidth` of that memory in bytes/s; `rates` in FLOP/s of dense
    products by type; `links` in bytes/s and one direction: "peer" to the other devices of its node, "network" to other
    nodes, "host" to the computer's memory, "disk". `overhead` is the time in s that launching a layer takes.
    """

    name: str
    kind: Literal["gpu", "cpu"]
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    links: Mapping[str, float]
    per_node: int
    overhead: float
    source: str
    date: str

    def rate(self, compute: str) -> float:
        """FLOP/s of products in `compute`; where the device has none, those of the next wider type that it has."""
        wider = {"fp8": "bfloat16", "bfloat16": "float16", "float16": "float32"}
        while compute not in self.rates and compute in wider:
            compute = wider[compute]
        return self.rates[compute]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """TFLOP/s of dense products (half of what a datasheet says "with sparsity")."""

    float32: float = 0.0
    """of float32, not TF32"""
    float16: float = 0.0
    """of float16, summed in float32"""
    bfloat16: float = 0.0
    """of bfloat16, summed in float32"""
    fp8: float = 0.0
    """of FP8, summed in float32"""
    int8: float = 0.0
    """of integers (TOP/s)"""
    fp4: float = 0.0
    """of FP4"""

    def __post_init__(self) -> None:
        check_not_negative(self, *(field.name for field in fields(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """GB/s in one direction; 0: there is no such link."""

    peer: float = 0.0
    """to the other devices of the node"""
    network: float = 0.0
    """to other nodes, for each device"""
    host: float = 0.0
    """to the memory of the computer it is in"""
    disk: float = 0.0
    """from the disk it comes with"""

    def __post_init__(self) -> None:
        check_not_negative(self, *(field.name for field in fields(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A device in a TOML file, in the units of datasheets."""

    kind: Literal["gpu", "cpu"] = "gpu"
    """an accelerator with memory of its own, or a computer that computes in its main memory"""
    memory_gb: float
    """memory in GB of 10^9 bytes"""
    bandwidth_gbs: float
    """bandwidth of that memory in GB/s"""
    rates_tflops: Rates
    """dense TFLOP/s by type; float32 is needed"""
    links_gbs: Links = Links()
    """links in GB/s, one direction"""
    per_node: int = 1
    """devices that share a node"""
    overhead_us: float = 0.0
    """microseconds that launching a layer takes"""
    source: str = ""
    """the document with these numbers"""
    date: str = ""
    """when that document was valid"""

    def __post_init__(self) -> None:
        check_positive(self, "memory_gb", "bandwidth_gbs", "per_node")
        check_not_negative(self, "overhead_us")
        check(self.rates_tflops.float32 > 0, "rates_tflops.float32", "is missing", "every device computes in float32")


def devices(extra: Path | None = None) -> Mapping[str, Device]:
    """All known devices by name: the package's, then those of the TOML file `extra`, which may replace values."""
    table = tomllib.loads((resources.files("moekit.plan") / "devices.toml").read_text("utf-8"))
    entries = _entries(table, {})
    if extra is not None:
        try:
            entries = _entries(read_toml(extra), entries)
        except ConfigError as error:
            raise InputError(f"{extra}: {error}", error.hint) from None
    return {name: _device(name, entry) for name, entry in entries.items()}


def device_named(name: str, extra: Path | None = None) -> Device:
    """The device `name`, however it is spelled ("RTX 4090"). Raises InputError with the nearest name."""
    known = devices(extra)
    wanted = _plain(name)
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}; others go into a device file"
        raise InputError(f"no device is called {name}", hint)
    return known[wanted]


@dataclass(frozen=True, kw_only=True, slots=True)
class _New:
    device: Entry | None = None


def _entries(table: Mapping[str, Any], base: Mapping[str, Entry]) -> dict[str, Entry]:
    """`base` with the devices of `table`; a device that is there already keeps what `table` does not name."""
    found = dict(base)
    for name, values in table.items():
        if not isinstance(values, Mapping):
            raise ConfigError(name, f"{values!r} is not a section", "write [name-of-the-device] and its values below")
        try:
            entry = update(_New(device=found.get(_plain(name))), {"device": values}).device
        except ConfigError as error:
            raise ConfigError(error.key.replace("device", name, 1), error.reason, error.hint) from None
        assert entry is not None
        found[_plain(name)] = entry
    return found


def _plain(name: str) -> str:
    """ "RTX 4090", "rtx_4090" and "rtx-4090" are one device."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


def _device(name: str, entry: Entry) -> Device:
    rates = {key: value * TERA for key, value in asdict(entry.rates_tflops).items() if value}
    links = {key: value * GIGA for key, value in asdict(entry.links_gbs).items() if value}
    memory, bandwidth = max(round(entry.memory_gb * GIGA), 1), entry.bandwidth_gbs * GIGA
    speeds = (memory, bandwidth, rates, links, entry.per_node, entry.overhead_us * 1e-6)
    return Device(name, entry.kind, *speeds, entry.source, entry.date)
