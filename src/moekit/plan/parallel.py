"""Experts spread over devices: what each one holds, how far a token travels, how much of that can be hidden."""

import math
from collections.abc import Mapping

from moekit.config.errors import check
from moekit.plan.blueprint import Blueprint, Mixture
from moekit.plan.experts import Reach, reach
from moekit.plan.figure import Figure, Section
from moekit.plan.precision import Precision
from moekit.plan.step import check_sizes, expert_bytes
from moekit.plan.traffic import Copies, Seconds, combine_bytes, direct, dispatch_bytes, forwarded
from moekit.plan.words import duration, scaled

TITLE = "Expert parallelism"

MOST_DEVICES = 10**6

ASSUMED = (
    "Tokens start on all devices equally, and each takes experts uniformly, of uniform groups where they are limited. "
    "Copies of an expert (redundant ones) do not shorten ways.",
    "Experts lie on the devices in order, so that a group lies on as few nodes as possible.",
    "Numbers travel as DeepSeek-V3's do: FP8 with a float32 scale for 128 to the experts, bfloat16 back "
    "(arXiv 2412.19437, section 3.3); indices and weights are left out.",
)


def expert_parallel(
    blueprint: Blueprint,
    precision: Precision,
    devices: int,
    per_node: int,
    redundant: int,
    tokens: int,
    links: Mapping[str, int | float],
    rate: int | float,
) -> Section:
    """Placement and traffic of one mixture layer whose experts are spread over `devices`, `per_node` in each node.

    `redundant` experts are copied once more in every layer; `tokens` start on each device; `links` in bytes/s in one
    direction for each device, "peer" inside a node and "network" between nodes; `rate` in FLOP/s computes the shared
    expert. Raises ConfigError for sizes that are none, and for devices that do not fill their nodes.
    """
    check_sizes(devices=devices, per_node=per_node, tokens=tokens)
    check(devices <= MOST_DEVICES, "devices", f"{devices} is more than {MOST_DEVICES:,}")
    check(0 <= redundant <= MOST_DEVICES, "redundant", f"{redundant} is no number of experts", "0 for none")
    check(rate > 0, "rate", f"{rate} FLOP/s computes nothing")
    per_node = min(per_node, devices)
    check(devices % per_node == 0, "devices", f"{devices} do not fill nodes of {per_node}", f"a multiple of {per_node}")
    if not blueprint.mixtures:
        return Section("parallel", TITLE, (), ("The model has no routed experts: there is nothing to spread.",))
    mixture = max(blueprint.mixtures, key=lambda m: m.layers * m.n_routed * m.expert)
    by_device, by_node = _reached(mixture, devices, per_node, mixture.n_groups, mixture.top_k_groups)
    figures = (
        *_placement(blueprint, precision, mixture, devices, redundant),
        *_reach(mixture, devices, per_node),
        *_traffic(blueprint.width, by_device, by_node, devices, per_node),
        *_times(blueprint, mixture, forwarded(by_device, by_node, devices, per_node), tokens, links, rate),
        _rows(mixture, tokens * devices),
        *_free_experts(mixture, devices // per_node, links),
    )
    others = (
        ("The layers with the most expert parameters are shown; the model has others.",)
        if blueprint.mixtures[1:]
        else ()
    )
    return Section("parallel", f"{TITLE} over {devices} devices", figures, (*others, *ASSUMED))


def _reached(mixture: Mixture, devices: int, per_node: int, groups: int, top_groups: int) -> tuple[Reach, Reach]:
    """Devices and nodes that a token reaches. With more devices than experts, the last ones hold copies only."""
    used = min(devices, mixture.n_routed)
    device_of = tuple(expert * used // mixture.n_routed for expert in range(mixture.n_routed))
    by_device = reach(device_of, mixture.top_k, groups, top_groups)
    return by_device, reach((device // per_node for device in device_of), mixture.top_k, groups, top_groups)


def _placement(
    blueprint: Blueprint, precision: Precision, mixture: Mixture, devices: int, redundant: int
) -> tuple[Figure, ...]:
    slots = math.ceil((mixture.n_routed + redundant) / devices)
    own = math.ceil(mixture.n_routed / devices)
    each = zip(blueprint.mixtures, expert_bytes(blueprint, precision), strict=True)
    held = sum(m.layers * math.ceil((m.n_routed + redundant) / devices) * size for m, size in each)
    return (
        Figure(
            "experts_per_device",
            "experts of a layer on a device, at most",
            own,
            formula="E / devices, rounded up",
            numbers=f"{mixture.n_routed} / {devices}",
        ),
        Figure(
            "redundant_per_device",
            "redundant experts on such a device, at most",
            slots - own,
            formula="(E + redundant) / devices, rounded up, less its own",
            numbers=f"({mixture.n_routed} + {redundant}) / {devices} - {own}",
        ),
        Figure(
            "devices_without_own",
            "devices without an expert of their own",
            max(0, devices - mixture.n_routed),
            formula="max(0, devices - E)",
            note="they hold redundant or shared experts",
        ),
        Figure(
            "expert_bytes_per_device",
            "routed experts of all layers on a device, at most",
            round(held),
            "B",
            formula="layers x slots x bytes of an expert",
            numbers=f"{mixture.layers} x {slots} x {scaled(held / mixture.layers / slots, 'B', 'bytes')}",
        ),
    )


def _reach(mixture: Mixture, devices: int, per_node: int) -> tuple[Figure, ...]:
    figures: list[Figure] = []
    limits = (("", mixture.n_groups, mixture.top_k_groups), ("_unlimited", 1, 1))
    for suffix, groups, top_groups in limits:
        limited = f"{top_groups} of {groups} groups" if groups > 1 else "no limit of groups"
        spread = f"{mixture.n_routed} experts on {devices} devices, {per_node} in a node; K = {mixture.top_k}"
        for place, found in zip(
            ("devices", "nodes"), _reached(mixture, devices, per_node, groups, top_groups), strict=True
        ):
            figures += [
                Figure(
                    f"reach.{place}_expected{suffix}",
                    f"{place} a token reaches, expected ({limited})",
                    found.expected,
                    formula="sum over places of 1 - C(experts elsewhere, K) / C(experts, K), both of M groups",
                    numbers=spread,
                ),
                Figure(
                    f"reach.{place}_max{suffix}",
                    f"{place} a token reaches, at most ({limited})",
                    found.most,
                    formula="min(K, places that the widest M groups lie on)",
                    numbers=spread,
                ),
            ]
    return tuple(figures)


def _traffic(width: int, by_device: Reach, by_node: Reach, devices: int, per_node: int) -> tuple[Figure, ...]:
    ways = (
        ("", "forwarded inside the node", forwarded(by_device, by_node, devices, per_node)),
        ("_naive", "straight to each device", direct(by_device, devices, per_node)),
    )
    directions = (("dispatch", dispatch_bytes(width)), ("combine", combine_bytes(width)))
    return tuple(
        Figure(
            f"{direction}.bytes_per_token_{link}{suffix}",
            f"{direction}, {link} nodes, {way}",
            copies * size,
            "B",
            formula="expected copies x bytes of a token",
            numbers=f"{copies:.3f} x {size:,}",
        )
        for direction, size in directions
        for suffix, way, both in ways
        for link, copies in zip(("inside", "across"), both, strict=True)
    )


def _times(
    blueprint: Blueprint,
    mixture: Mixture,
    copies: Copies,
    tokens: int,
    links: Mapping[str, int | float],
    rate: int | float,
) -> tuple[Figure, ...]:
    """One layer. Missing links leave the times out."""
    needed = {"peer": copies.inside, "network": copies.across}
    missing = [name for name, count in needed.items() if count and not links.get(name)]
    if missing:
        note = f"no link `{', '.join(missing)}` is known"
        return (Figure("time.total_seconds", "travelling for a layer", None, "s", note=note),)
    speeds = [links.get(name) or math.inf for name in needed]
    sizes = {"dispatch": dispatch_bytes(blueprint.width), "combine": combine_bytes(blueprint.width)}
    out, back = (
        Seconds(*(tokens * count * size / speed for count, speed in zip(copies, speeds, strict=True)))
        for size in sizes.values()
    )
    total = out.longer + back.longer
    times = tuple(
        Figure(
            f"time.{direction}_{link}_seconds",
            f"{direction} of {tokens:,} tokens of a device, {link} nodes",
            time,
            "s",
            formula="tokens x copies x bytes / link",
            numbers=f"{tokens:,} x {count:.3f} x {sizes[direction]:,} / {scaled(speed, 'B/s', 'B/s')}" if count else "",
        )
        for direction, both in (("dispatch", out), ("combine", back))
        for link, time, count, speed in zip(("inside", "across"), both, copies, speeds, strict=True)
    )
    return (
        *times,
        Figure(
            "time.total_seconds",
            "travelling for a layer",
            total,
            "s",
            formula="max(inside, across) of dispatch + the same of combine",
            numbers=f"{duration(out.longer)} + {duration(back.longer)}",
            note="latency left out",
        ),
        *_hidden(mixture, total, tokens, rate),
    )


def _hidden(mixture: Mixture, total: float, tokens: int, rate: int | float) -> tuple[Figure, ...]:
    """How much of the `total` time of travelling passes while the device computes its shared experts."""
    shared = 2 * mixture.shared * tokens / rate
    return (
        Figure(
            "hidden.shared_seconds",
            "computing the shared experts meanwhile",
            shared,
            "s",
            formula="2 x parameters of shared experts x tokens / rate",
            numbers=f"2 x {mixture.shared:,} x {tokens:,} / {scaled(rate, 'FLOP/s', 'FLOP/s')}",
        ),
        Figure(
            "hidden.seconds",
            "travelling hidden behind them, at most",
            min(total, shared),
            "s",
            formula="min(travelling, computing)",
        ),
        Figure(
            "hidden.visible_seconds",
            "travelling that remains visible for a layer",
            max(0.0, total - shared),
            "s",
            formula="travelling - hidden",
            note="a second micro-batch can hide more (DualPipe)",
        ),
        Figure(
            "hidden.visible_seconds_all_layers",
            "the same for all layers with experts",
            mixture.layers * max(0.0, total - shared),
            "s",
            formula="layers x visible",
            note="forward pass only",
        ),
    )


def _rows(mixture: Mixture, tokens: int) -> Figure:
    return Figure(
        "rows_per_expert",
        "rows of an expert's product, on average",
        tokens * mixture.top_k / mixture.n_routed,
        formula="tokens of all devices x K / E",
        numbers=f"{tokens:,} x {mixture.top_k} / {mixture.n_routed}",
    )


def _free_experts(mixture: Mixture, nodes: int, links: Mapping[str, int | float]) -> tuple[Figure, ...]:
    """How many experts of a node a token could take before the link inside takes longer than the one across."""
    if nodes == 1 or not links.get("peer") or not links.get("network"):
        return ()
    ratio = links["peer"] / links["network"]
    free = Figure(
        "free_experts_per_node",
        "experts of each node that cost no more than one",
        ratio,
        formula="link inside / link across",
        numbers=f"{scaled(links['peer'], 'B/s', 'B/s')} / {scaled(links['network'], 'B/s', 'B/s')}",
        note="arXiv 2412.19437, section 3.2.2",
    )
    if nodes != mixture.n_groups:
        return (free,)
    reached = Figure(
        "free_experts",
        "experts that a token could take at the same cost",
        mixture.top_k_groups * ratio,
        formula="M x experts of each node, because a group is a node",
        numbers=f"{mixture.top_k_groups} x {ratio:.3g}",
    )
    return free, reached
