"""A model larger than its device: which experts lie in which memory, and how fast a token can be then."""

import math
from typing import NamedTuple

from moekit.config.errors import check
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.figure import Figure, Section
from moekit.plan.memory import cache_bytes
from moekit.plan.precision import Format, Precision
from moekit.plan.step import Step, check_sizes, decode_step, expert_bytes
from moekit.plan.words import duration, scaled

TITLE = "Experts outside the device"

ASSUMED = (
    "One sequence. All of each memory may hold weights, at peak bandwidths: times are at least, tokens/s at most.",
    "What every token needs is placed first: all weights but routed experts and the prediction module, and the cache. "
    "Experts take what is left, and those in main memory are computed by its processor at the speed of that memory.",
    "Experts that are found lie in the device and in main memory in proportion to their slots.",
)


class Memories(NamedTuple):
    """Something for each memory: the device's, the computer's, the disk."""

    device: float
    ram: float
    disk: float


class Placed(NamedTuple):
    """Bytes of what every token needs, and the number of experts, in each memory."""

    resident: Memories
    experts: Memories

    @property
    def cached(self) -> float:
        """The share of the experts that is not on the disk."""
        return 1 - self.experts.disk / sum(self.experts)


def offload(  # noqa: PLR0913, PLR0917 - the machine is described by single numbers, as a person gives them
    blueprint: Blueprint,
    precision: Precision,
    kv: Format,
    context: int,
    device: Device,
    ram: int | float,
    ram_bandwidth: int | float,
    disk_bandwidth: int | float,
    hit_rate: float | None,
) -> Section:
    """Slots for experts in each memory, and the bound for one token where the rest is read from the disk.

    `ram` in bytes, bandwidths in bytes/s. `hit_rate` is the share of a token's experts that is found in memory; without
    one it is that of uniform choices. A device of kind "cpu" computes in main memory, at its own bandwidth; `ram`, if
    above 0, is how much of it there is. Raises ConfigError for numbers that cannot be.
    """
    check_sizes(context=context)
    for key, speed in (("ram_bandwidth", ram_bandwidth), ("disk_bandwidth", disk_bandwidth)):
        check(0 < speed < math.inf, key, f"{speed} is no bandwidth", "bytes/s above 0")
    check(0 <= ram <= 1e18, "ram", f"{ram} is no size of a memory", "bytes; 0 for none beside the device's")
    check(hit_rate is None or 0 <= hit_rate <= 1, "hit_rate", f"{hit_rate} is no share", "0 to 1")
    if not blueprint.mixtures:
        return Section("offload", TITLE, (), ("The model has no routed experts: there is nothing to place.",))
    sizes, speeds = Memories(device.memory, ram, 0), Memories(device.bandwidth, ram_bandwidth, disk_bandwidth)
    if device.kind == "cpu":
        sizes, speeds = Memories(0, ram or device.memory, 0), speeds._replace(ram=device.bandwidth)
    resident = _resident_bytes(blueprint, precision, kv, context)
    each = expert_bytes(blueprint, precision)
    placed = _place(blueprint, resident, each, sizes)
    step = decode_step(blueprint, precision, kv, context, 1)
    hits = _hit_rate(placed, hit_rate)
    reads = _reads(step, placed, hits)
    figures = (
        *_needs(blueprint, placed, each, sizes),
        *_slots(blueprint, placed),
        *_hits(placed, hits, hit_rate),
        *_times(step, reads, speeds, device),
    )
    return Section("offload", TITLE, figures, (_sentence(blueprint, step, placed, hits, reads), *ASSUMED))


def _resident_bytes(blueprint: Blueprint, precision: Precision, kv: Format, context: int) -> int:
    kept = (weight for weight in blueprint.weights if weight.part not in ("routed", "prediction"))
    return sum(precision.bytes_of(weight) for weight in kept) + cache_bytes(blueprint, kv, context, 1)


def _place(blueprint: Blueprint, resident: int, each: tuple[float, ...], sizes: Memories) -> Placed:
    """Fill the device, then main memory; experts of different mixtures count with their mean size."""
    total = sum(m.layers * m.n_routed for m in blueprint.mixtures)
    mean = _routed_bytes(blueprint, each) / total
    first = min(resident, sizes.device)
    second = min(resident - first, sizes.ram)
    in_device = min(total, (sizes.device - first) // mean)
    in_ram = min(total - in_device, (sizes.ram - second) // mean)
    return Placed(
        Memories(first, second, resident - first - second), Memories(in_device, in_ram, total - in_device - in_ram)
    )


def _routed_bytes(blueprint: Blueprint, each: tuple[float, ...]) -> float:
    return sum(m.layers * m.n_routed * size for m, size in zip(blueprint.mixtures, each, strict=True))


def _hit_rate(placed: Placed, wanted: float | None) -> float:
    """What is not held is never found, and what is held whole always."""
    if wanted is None or placed.cached in (0, 1):
        return placed.cached
    return wanted


def _reads(step: Step, placed: Placed, hits: float) -> Memories:
    """Bytes that a token reads from each memory. What comes from the disk crosses main memory once more."""
    everything = step.weights + step.sequences
    resident = Memories(*(everything * part / sum(placed.resident) for part in placed.resident))
    found = placed.experts.device + placed.experts.ram
    from_device = resident.device + (step.experts * hits * placed.experts.device / found if found else 0)
    from_disk = resident.disk + step.experts * (1 - hits)
    return Memories(from_device, step.bytes - from_device, from_disk)


def _needs(blueprint: Blueprint, placed: Placed, each: tuple[float, ...], sizes: Memories) -> tuple[Figure, ...]:
    resident, routed = round(sum(placed.resident)), round(_routed_bytes(blueprint, each))
    held = round(sizes.device + sizes.ram)
    parts = " + ".join(
        f"{m.layers} x {m.n_routed} x {scaled(size, 'B', 'bytes')}"
        for m, size in zip(blueprint.mixtures, each, strict=True)
    )
    return (
        Figure(
            "resident_bytes",
            "what every token needs, and the cache",
            resident,
            "B",
            formula="sum over all weights but routed experts + context x cache of a token",
        ),
        Figure("expert_bytes", "routed experts", routed, "B", formula="layers x E x bytes of an expert", numbers=parts),
        Figure("memory_bytes", "memory without the disk", held, "B", formula="device + main memory"),
        Figure(
            "fits",
            "everything fits without the disk",
            not placed.experts.disk and not placed.resident.disk,
            formula="needed <= device + main memory, in whole experts",
            numbers=f"{scaled(resident + routed, 'B', 'bytes')} against {scaled(held, 'B', 'bytes')}",
        ),
        Figure(
            "missing_bytes",
            "memory that is missing",
            max(0, resident + routed - held),
            "B",
            formula="max(0, needed - device - main memory)",
        ),
    )


def _slots(blueprint: Blueprint, placed: Placed) -> tuple[Figure, ...]:
    layers = sum(m.layers for m in blueprint.mixtures)
    return tuple(
        figure
        for key, place, count in zip(
            ("device", "ram", "disk"), ("device", "main memory", "disk"), placed.experts, strict=True
        )
        for figure in (
            Figure(f"slots.{key}", f"experts in the {place}", int(count), formula="memory left / bytes of an expert"),
            Figure(
                f"slots_per_layer.{key}",
                f"experts of a layer in the {place}",
                count / layers,
                formula="experts there / layers",
                numbers=f"{int(count):,} / {layers}",
            ),
        )
    )


def _hits(placed: Placed, hits: float, wanted: float | None) -> tuple[Figure, ...]:
    if placed.cached in (0, 1):
        note = "all experts are in memory" if placed.cached else "no expert is in memory"
    else:
        note = "uniform guess: replay a trace for the truth" if wanted is None else "as given"
    return (
        Figure(
            "hit_rate_uniform",
            "experts found in memory for uniform choices",
            100 * placed.cached,
            "%",
            formula="C / E",
            numbers=f"{int(placed.experts.device + placed.experts.ram):,} / {int(sum(placed.experts)):,}",
        ),
        Figure("hit_rate", "experts found in memory", 100 * hits, "%", note=note),
    )


def _times(step: Step, reads: Memories, speeds: Memories, device: Device) -> tuple[Figure, ...]:
    seconds = Memories(*(amount / speed for amount, speed in zip(reads, speeds, strict=True)))
    compute = sum(flops / device.rate(name) for name, flops in step.flops.items())
    figures = [
        figure
        for key, place, amount, speed, time in zip(
            ("device", "ram", "disk"), ("device", "main memory", "disk"), reads, speeds, seconds, strict=True
        )
        for figure in (
            Figure(f"bytes_per_token.{key}", f"read from the {place} for a token", amount, "B"),
            Figure(
                f"seconds.{key}",
                f"time of reading from the {place}",
                time,
                "s",
                formula="bytes / bandwidth",
                numbers=f"{scaled(amount, 'B', 'bytes')} / {scaled(speed, 'B/s', 'B/s')}",
            ),
        )
    ]
    least, serial = max(*seconds, compute), sum(seconds)
    slowest = max((*zip(seconds, ("device", "main memory", "disk"), strict=True), (compute, "computing")))[1]
    figures += [
        Figure(
            "seconds.compute",
            "time of computing, all on the device",
            compute,
            "s",
            formula="sum over types of FLOPs / rate",
            note="experts that a processor computes in main memory take longer",
        ),
        *_rate("overlapped", "everything overlaps", least, "max of these times"),
        *_rate("serial", "nothing overlaps", serial, "device + main memory + disk"),
        Figure("bound_by", "bound by", slowest),
    ]
    host = device.links.get("host")
    if host and reads.ram:
        figures += _rate(
            "copied",
            "experts are copied to the device instead",
            max(seconds.device, seconds.disk, reads.ram / host),
            "max(device, disk, bytes outside the device / link to the host)",
        )
    return tuple(figures)


def _rate(key: str, when: str, seconds: float, formula: str) -> tuple[Figure, Figure]:
    return (
        Figure(f"seconds.{key}", f"time of a token if {when}, at least", seconds, "s", formula=formula),
        Figure(
            f"tokens_per_second.{key}",
            f"tokens per second if {when}, at most",
            1 / seconds,
            "tokens/s",
            formula="1 / time",
            numbers=f"1 / {duration(seconds)}",
        ),
    )


def _sentence(blueprint: Blueprint, step: Step, placed: Placed, hits: float, reads: Memories) -> str:
    taken = sum(m.layers * m.top_k for m in blueprint.mixtures)
    total = int(sum(placed.experts))
    size = scaled(step.experts, "B", "bytes")
    start = f"A token reads {taken:,} of {total:,} experts, {size}, and the next token others"
    if not reads.disk:
        return f"{start}; all of them are in memory."
    return (
        f"{start}; memory holds {100 * placed.cached:.0f} % of all and {100 * hits:.0f} % of those wanted, "
        f"so {scaled(reads.disk, 'B', 'bytes')} come from the disk for each token."
    )
