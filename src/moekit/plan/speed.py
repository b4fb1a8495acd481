"""How fast a model can be at most: bounds from bytes over bandwidth and FLOPs over rates."""

from collections.abc import Callable

from moekit.plan.advantage import advantage
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.experts import distinct_experts
from moekit.plan.figure import Figure, Section
from moekit.plan.precision import Format, Precision
from moekit.plan.step import (
    LARGEST,
    LeastTime,
    Step,
    check_sizes,
    decode_step,
    expert_bytes,
    forward_step,
    least_time,
)
from moekit.plan.words import duration, scaled

ASSUMED = (
    "These are bounds: time is at least, tokens/s are at most. Peak bandwidth and peak rates are taken as reached, "
    "reading and computing as overlapped completely.",
    "Whether the model fits is another question: it is taken to be in the memory of the devices.",
    "Tokens choose experts uniformly and independently; tokens that choose alike read fewer.",
)
SPLIT = "Several devices share bytes and FLOPs perfectly, and sending between them costs nothing."


def speed(
    blueprint: Blueprint,
    precision: Precision,
    kv: Format,
    context: int,
    batch: int,
    prompt: int,
    device: Device,
    n_devices: int,
) -> Section:
    """Bounds for generating at `context` tokens, reading `prompt` tokens, and training on sequences of `context`.

    `batch` sequences at once. Raises ConfigError for sizes that are none.
    """
    check_sizes(context=context, batch=batch, prompt=prompt, n_devices=n_devices)
    step = decode_step(blueprint, precision, kv, context, batch)
    time = least_time(step, device, n_devices, blueprint.layers)
    bounds = (
        *_reading(blueprint, precision, batch),
        *_decode(step, time, context, batch, device, n_devices),
        _break_even(blueprint, precision, kv, context, device),
        *_prefill(blueprint, precision, kv, (prompt, batch), device, n_devices),
        *_training(blueprint, precision, kv, (context, batch), device, n_devices),
    )
    dense = advantage(blueprint, precision, kv, (context, batch), device, n_devices) if blueprint.mixtures else ()
    notes = (*ASSUMED, SPLIT) if n_devices > 1 else ASSUMED
    title = f"Speed bounds on {n_devices} x {device.name}" if n_devices > 1 else f"Speed bounds on {device.name}"
    return Section("speed", title, (*bounds, *dense), notes)


def _reading(blueprint: Blueprint, precision: Precision, batch: int) -> tuple[Figure, ...]:
    """What one token takes of the experts, and how far a batch shares them."""
    if not blueprint.mixtures:
        return ()
    sizes = expert_bytes(blueprint, precision)
    each = tuple(zip(blueprint.mixtures, sizes, strict=True))
    first = blueprint.mixtures[0]
    chosen = sum(m.layers * m.top_k for m in blueprint.mixtures)
    distinct = distinct_experts(first.n_routed, first.top_k, batch)
    return (
        Figure(
            "token.experts",
            "experts that a token takes",
            chosen,
            formula="layers x K, over the kinds of mixture",
            numbers=" + ".join(f"{m.layers} x {m.top_k}" for m in blueprint.mixtures),
            note="in all layers; others for the next token",
        ),
        Figure(
            "token.expert_parameters",
            "their parameters",
            sum(m.layers * m.top_k * m.expert for m in blueprint.mixtures),
            formula="layers x K x parameters of an expert",
            numbers=" + ".join(f"{m.layers} x {m.top_k} x {m.expert:,}" for m in blueprint.mixtures),
        ),
        Figure(
            "token.expert_bytes",
            "their bytes",
            round(sum(m.layers * m.top_k * size for m, size in each)),
            "B",
            formula="layers x K x bytes of an expert",
            numbers=" + ".join(f"{m.layers} x {m.top_k} x {scaled(size, 'B', 'bytes')}" for m, size in each),
        ),
        Figure(
            "decode.distinct_experts",
            "distinct experts of a layer for the batch",
            distinct,
            formula="E (1 - (1 - K/E)^B)",
            numbers=f"{first.n_routed} (1 - (1 - {first.top_k}/{first.n_routed})^{batch})",
            note="expected for uniform, independent choices",
        ),
    )


def _decode(
    step: Step, time: LeastTime, context: int, batch: int, device: Device, n_devices: int
) -> tuple[Figure, ...]:
    return (
        *_traffic(step, context, batch),
        Figure(
            "decode.flops",
            "computed for a step",
            step.all_flops,
            "FLOP",
            formula="B (2 x weights in products + layers x context x 2 n_h (width of q k + width of v))",
            numbers=_by_type(step),
            note="a latent cache is used as it is, with its own widths (absorbed, arXiv 2405.04434, section 2.1.2)",
        ),
        *_timed("decode", step, time, batch, device, n_devices),
        Figure(
            "decode.tokens_per_second_each",
            "tokens per second of one sequence, at most",
            1 / time.seconds,
            "tokens/s",
            formula="1 / time of a step",
            numbers=f"1 / {duration(time.seconds)}",
        ),
    )


def _traffic(step: Step, context: int, batch: int) -> tuple[Figure, ...]:
    """What a step of generating reads."""
    amounts = tuple(scaled(x, "B", "bytes") for x in (step.weights, step.experts, step.sequences))
    return (
        Figure(
            "decode.weight_bytes",
            "read of weights every token meets",
            step.weights,
            "B",
            formula="sum over all weights but routed experts and tables that are looked up in",
        ),
        Figure(
            "decode.expert_bytes",
            "read of routed experts",
            step.experts,
            "B",
            formula="layers x distinct experts x bytes of an expert, over the kinds of mixture",
        ),
        Figure(
            "decode.cache_bytes",
            "read of caches and embedding rows",
            step.sequences,
            "B",
            formula="B (context x bytes per token + one row)",
            numbers=f"{batch} x {scaled(step.sequences / batch, 'B', 'bytes')} at a context of {context:,}",
        ),
        Figure(
            "decode.bytes",
            "read for a step",
            step.bytes,
            "B",
            formula="weights + experts + caches",
            numbers=" + ".join(amounts),
        ),
        Figure(
            "decode.bytes_per_token",
            "read for a token",
            step.bytes / batch,
            "B",
            formula="bytes of a step / B",
            numbers=f"{scaled(step.bytes, 'B', 'bytes')} / {batch}",
        ),
    )


def _by_type(step: Step) -> str:
    return " + ".join(f"{scaled(flops, 'FLOP', 'FLOP')} in {name}" for name, flops in step.flops.items())


def _timed(key: str, step: Step, time: LeastTime, tokens: int, device: Device, n_devices: int) -> tuple[Figure, ...]:
    rates = ", ".join(f"{scaled(device.rate(name), 'FLOP/s', 'FLOP/s')} in {name}" for name in step.flops)
    bandwidth = scaled(device.bandwidth, "B/s", "B/s")
    return (
        Figure(
            f"{key}.memory_seconds",
            "time of reading",
            time.memory,
            "s",
            formula="bytes / (devices x bandwidth)",
            numbers=f"{scaled(step.bytes, 'B', 'bytes')} / ({n_devices} x {bandwidth})",
        ),
        Figure(
            f"{key}.compute_seconds",
            "time of computing",
            time.compute,
            "s",
            formula="sum over types of FLOPs / (devices x rate)",
            numbers=f"{scaled(step.all_flops, 'FLOP', 'FLOP')} / ({n_devices} x rate), {rates}",
        ),
        Figure(
            f"{key}.overhead_seconds",
            "time of launching",
            time.overhead,
            "s",
            formula="layers x overhead of the device",
            numbers=f"{duration(device.overhead)} for each",
        ),
        Figure(
            f"{key}.seconds",
            "time, at least",
            time.seconds,
            "s",
            formula="max(reading, computing) + launching",
            numbers=f"max({duration(time.memory)}, {duration(time.compute)}) + {duration(time.overhead)}",
            note="a lower bound",
        ),
        Figure(
            f"{key}.tokens_per_second",
            "tokens per second, at most",
            tokens / time.seconds,
            "tokens/s",
            formula="tokens / time",
            numbers=f"{tokens:,} / {duration(time.seconds)}",
            note="an upper bound",
        ),
        Figure(f"{key}.bound_by", "bound by", time.binding, note="the longest of the three times"),
    )


def _break_even(blueprint: Blueprint, precision: Precision, kv: Format, context: int, device: Device) -> Figure:
    """The batch from which a step is bound by computing."""

    def surplus(batch: int) -> float:
        time = least_time(decode_step(blueprint, precision, kv, context, batch), device, 1, 0)
        return time.memory - time.compute

    found = _first_not_above_zero(surplus)
    return Figure(
        "decode.break_even_batch",
        "batch from which computing takes longer than reading",
        found,
        formula="the smallest B with bytes(B) / bandwidth <= FLOPs(B) / rate",
        note="" if found else "none: a sequence's own cache takes longer to read than its token to compute",
    )


def _first_not_above_zero(surplus: Callable[[int], float]) -> int | None:
    """By bisection, for what is concave and above 0 at 0: it changes its sign once, or not below 10^12."""
    low, high = 0, LARGEST
    if surplus(high) > 0:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return high


def _prefill(
    blueprint: Blueprint, precision: Precision, kv: Format, shape: tuple[int, int], device: Device, n_devices: int
) -> tuple[Figure, ...]:
    prompt, batch = shape
    step = forward_step(blueprint, precision, kv, prompt, batch)
    time = least_time(step, device, n_devices, blueprint.layers)
    flops = Figure(
        "prefill.flops",
        "computed for the prompt",
        step.all_flops,
        "FLOP",
        numbers=_by_type(step),
        formula="B (2 x weights in products x T + layers x T (T + 1) / 2 x 2 n_h (width of q k + width of v))",
        note=f"{batch} x {prompt:,} tokens at once, causal pairs only, logits of the last token only",
    )
    return flops, *_timed("prefill", step, time, batch * prompt, device, n_devices)


def _training(
    blueprint: Blueprint, precision: Precision, kv: Format, shape: tuple[int, int], device: Device, n_devices: int
) -> tuple[Figure, ...]:
    length, batch = shape
    step = forward_step(blueprint, precision, kv, length, batch, logits=length).times(3)
    time = least_time(step, device, n_devices, 3 * blueprint.layers)
    flops = Figure(
        "training.flops",
        "computed for a training step",
        step.all_flops,
        "FLOP",
        formula="3 x forward",
        numbers=f"3 x {scaled(step.all_flops / 3, 'FLOP', 'FLOP')}",
        note=f"{batch} sequences of {length:,} tokens; the backward pass counts twice the forward pass; nothing is "
        "computed again, the optimizer and the prediction module are left out",
    )
    return flops, *_timed("training", step, time, batch * length, device, n_devices)
