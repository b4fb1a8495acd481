"""Does a model fit on devices: what it needs, what breaks it, how many devices it takes, how far it goes."""

from typing import NamedTuple

from moekit.plan.activations import logits, working_set
from moekit.plan.blueprint import Attention, Blueprint
from moekit.plan.compute import check_sizes
from moekit.plan.devices import Device
from moekit.plan.figure import Figure, Section
from moekit.plan.memory import cache_bytes, stored_bytes
from moekit.plan.precision import Format, Precision

USABLE = 0.9
"""The share of a device's memory that weights, cache and working set may take; the rest is the runtime's."""

CHUNK = 2048
"""Tokens of a prompt that are read at once, as servers do."""


class _Needs(NamedTuple):
    """Bytes in all of weights and of one sequence (cache and logits), and on each device of the working set."""

    weights: int
    cache: int
    logits: int
    working: int


def fit(
    blueprint: Blueprint, precision: Precision, kv: Format, context: int, batch: int, device: Device, n_devices: int = 1
) -> Section:
    """Bytes against memory on `n_devices`, devices needed, and the largest context and batch that fit.

    Weights and cache are taken to be spread evenly over devices; each reads prompts in chunks.
    """
    check_sizes(context=context, batch=batch, n_devices=n_devices)
    width = 4 if precision.default.compute == "float32" else 2
    weights = sum(size for part, size in stored_bytes(blueprint, precision).items() if part != "prediction")
    needs = _Needs(
        weights,
        cache_bytes(blueprint, kv, context, 1),
        logits(blueprint, 1, width),
        working_set(blueprint, CHUNK, width),
    )
    room = int(device.memory * USABLE) - needs.working
    figures = (
        *_balance(needs, batch, device, n_devices),
        *_counts(needs, batch, device, room),
        *_largest(blueprint, kv, needs, batch, room * n_devices - weights),
        _sentence(blueprint, precision, needs, batch, device, room),
    )
    notes = (
        f"{USABLE:.0%} of the memory is counted as usable; weights and cache spread evenly over devices.",
        f"Prompts are read in chunks of {CHUNK:,} tokens; prediction modules are not loaded.",
    )
    return Section("fit", f"On {n_devices} x {device.name}", figures, notes)


def read_per_token(blueprint: Blueprint, precision: Precision) -> int:
    """Bytes of the weights that compute one token: each matrix that it meets, and one row of the embedding."""
    total = 0
    for w in blueprint.weights:
        shape = (1, *w.shape[1:]) if w.kind == "lookup" else w.shape
        total += precision.format_of(w).bytes_of(shape, w.used)
    return total


def largest_context(blueprint: Blueprint, kv: Format, room: int) -> int | None:
    """The longest sequence whose cache fits in `room` bytes; None if there is no limit (windows, or nothing cached).

    The cache grows by the bytes of all layers up to the smallest window, then without the layers that have it, and on.
    """
    if room < 0:
        return 0
    layers = [a for a in blueprint.attentions if a.causal]
    reached = 0
    for window in (*sorted({a.window for a in layers if a.window is not None}), None):
        rate = sum(_row(a, kv) for a in layers if a.window is None or a.window > reached)
        if not rate:
            return None
        if window is None or reached + room // rate < window:
            return reached + room // rate
        room -= (window - reached) * rate
        reached = window
    return None


def _row(attention: Attention, kv: Format) -> int:
    return kv.bytes_of((attention.cached,), attention.layers)


def _balance(needs: _Needs, batch: int, device: Device, n_devices: int) -> list[Figure]:
    """What each device holds, in the order in which it is loaded; the first that passes the limit breaks it."""
    usable = int(device.memory * USABLE)
    each = {
        "weights": -(-needs.weights // n_devices),
        "cache": -(-needs.cache * batch // n_devices),
        "logits": -(-needs.logits * batch // n_devices),
        "working_set": needs.working,
    }
    held, breaks = 0, None
    for part, size in each.items():
        held += size
        breaks = breaks or (part if held > usable else None)
    formulas = {"working_set": f"forward pass of {CHUNK:,} tokens"}
    figures = [
        Figure(
            f"needs.{part}", f"each device, {part.replace('_', ' ')}", size, "B", formulas.get(part, "in all / devices")
        )
        for part, size in each.items()
    ]
    numbers = " + ".join(f"{size:,}" for size in each.values())
    limit = f"{USABLE} x {device.memory:,}"
    return [
        *figures,
        Figure("needs.total", "each device", held, "B", "weights + cache + logits + working set", numbers),
        Figure(
            "usable", "usable of each device", usable, "B", "share x memory", limit, f"{device.source} ({device.date})"
        ),
        Figure("fits", "fits", breaks is None, "", "needs <= usable", f"{held:,} <= {usable:,}"),
        Figure("breaks", "does not fit from", breaks, "", "the first part that passes the limit"),
    ]


def _counts(needs: _Needs, batch: int, device: Device, room: int) -> list[Figure]:
    alone, both = devices_needed(needs.weights, device.memory), None
    spread = needs.weights + batch * (needs.cache + needs.logits)
    if room > 0:
        both = devices_needed(spread, room)
    return [
        Figure(
            "devices.weights_alone",
            "devices for the weights alone",
            alone,
            "devices",
            "weights / memory, rounded up",
            f"{needs.weights:,} / {device.memory:,}",
            "a lower bound: nothing but weights in all of the memory",
        ),
        Figure(
            "devices.with_cache",
            "devices with cache and working set",
            both,
            "devices",
            "(weights + cache + logits) / (usable - working set), rounded up",
            f"{spread:,} / {room:,}",
            "none: the working set alone is too large for one device" if both is None else "",
        ),
    ]


def devices_needed(size: int, memory: int) -> int:
    """How many memories hold `size` bytes."""
    return -(-size // memory)


def _largest(blueprint: Blueprint, kv: Format, needs: _Needs, batch: int, room: int) -> list[Figure]:
    """`room` bytes are left on all devices for caches and logits."""
    context = largest_context(blueprint, kv, room // batch - needs.logits)
    sequence = needs.cache + needs.logits
    sequences = max(room, 0) // sequence if sequence else None
    note = f"the model is meant for {blueprint.max_positions:,} tokens"
    return [
        Figure(
            "largest_context",
            f"longest context for {batch:,} sequences",
            context,
            "tokens",
            "(usable - working set - weights - logits) / (sequences x bytes of a token)",
            f"{room:,} / {batch:,} - {needs.logits:,} over the bytes of a token",
            note if context is not None else "no limit: the cache stops growing",
        ),
        Figure(
            "largest_batch",
            "most sequences of this context",
            sequences,
            "",
            "(usable - working set - weights) / (cache + logits of a sequence)",
            f"{room:,} / ({needs.cache:,} + {needs.logits:,})",
            "no limit: nothing is kept" if sequences is None else "",
        ),
    ]


def _sentence(
    blueprint: Blueprint, precision: Precision, needs: _Needs, batch: int, device: Device, room: int
) -> Figure:
    stored = sum(w.stored for w in blueprint.weights if w.part != "prediction")
    alone = devices_needed(needs.weights, device.memory)
    spread = needs.weights + batch * (needs.cache + needs.logits)
    more = f", {devices_needed(spread, room)} with cache and working set" if room > 0 else ""
    text = (
        f"The {_billions(stored)} parameters of {blueprint.name} need {_gigabytes(needs.weights)} as {precision.name}; "
        f"{device.name} has {_gigabytes(device.memory)}: {alone} for the weights alone{more}. "
        f"One token reads {_gigabytes(read_per_token(blueprint, precision))} of them."
    )
    return Figure("sentence", "in words", text)


def _billions(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:,}"


def _gigabytes(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:,} B"
