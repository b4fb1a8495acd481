"""What a mixture gains over the dense models of its total and of its active size."""

from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.figure import Figure
from moekit.plan.precision import Format, Precision
from moekit.plan.step import decode_step, least_time
from moekit.plan.words import duration, scaled


def advantage(
    blueprint: Blueprint, precision: Precision, kv: Format, shape: tuple[int, int], device: Device, n_devices: int
) -> tuple[Figure, ...]:
    """Decoding time and FLOPs of two dense models with the same attention, over ours; `shape` = (context, batch)."""
    context, batch = shape
    ours = decode_step(blueprint, precision, kv, context, batch)
    time = least_time(ours, device, n_devices, blueprint.layers).seconds
    figures: list[Figure] = []
    for key, what, twin in (
        ("dense_total", "a dense model of equal total size", every_expert(blueprint)),
        ("dense_active", "a dense model of equal active size", only_active(blueprint)),
    ):
        step = decode_step(twin, precision, kv, context, batch)
        seconds = least_time(step, device, n_devices, blueprint.layers).seconds
        flops = f"{scaled(step.all_flops, 'FLOP', 'FLOP')} / {scaled(ours.all_flops, 'FLOP', 'FLOP')}"
        figures += [
            Figure(
                f"{key}.time_ratio",
                f"decoding time of {what}, relative",
                seconds / time,
                formula="its bound / the bound of this model",
                numbers=f"{duration(seconds)} / {duration(time)}",
                note="above 1: the mixture is faster; both at the same batch and context",
            ),
            Figure(
                f"{key}.flops_ratio",
                f"FLOPs of {what}, relative",
                step.all_flops / ours.all_flops,
                formula="its FLOPs / the FLOPs of this model",
                numbers=flops,
            ),
        ]
    return tuple(figures)


def every_expert(blueprint: Blueprint) -> Blueprint:
    """The dense model of equal total size: a token takes all the experts."""
    weights = (w._replace(used=w.count) if w.part == "routed" else w for w in blueprint.weights)
    mixtures = (m._replace(top_k=m.n_routed) for m in blueprint.mixtures)
    return blueprint._replace(weights=tuple(weights), mixtures=tuple(mixtures))


def only_active(blueprint: Blueprint) -> Blueprint:
    """The dense model of equal active size: there are no more experts than a token takes."""
    weights = (w._replace(count=w.used) if w.part == "routed" else w for w in blueprint.weights)
    mixtures = (m._replace(n_routed=m.top_k) for m in blueprint.mixtures)
    return blueprint._replace(weights=tuple(weights), mixtures=tuple(mixtures))
