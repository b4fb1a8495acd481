"""Predictions beside what this machine then did."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from moekit.config.model import ModelConfig
from moekit.measure.child import Measured, in_child
from moekit.measure.machine import DTYPES, narrow, rate_for, vector_bandwidth
from moekit.measure.shrink import parameters, shrunk
from moekit.measure.workloads import Rates, best_rates, generator, train_steps
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.figure import Figure, Section
from moekit.plan.from_config import blueprint_of
from moekit.plan.memory import Layout, Training, memory
from moekit.plan.precision import FORMATS, parse_precision
from moekit.plan.speed import speed
from moekit.plan.training import muon_flops

MOST_GENERATED = 1_500_000_000
"""Parameters of the model that generates, at most: more of them take minutes to fill."""

MOST_TRAINED = 120_000_000
"""Parameters of the model that is trained."""

NEW = 16
"""Tokens that are generated."""

ROUNDS, TRIES = 3, 2
"""How often limits and generation are measured in turn, the middle ratio of which counts, and how often a text is
generated in each."""


class Size(NamedTuple):
    """How much is done at a time: sequences, and tokens of each."""

    batch: int
    length: int


class Limits(NamedTuple):
    """Bytes/s that products with one vector read, and FLOP/s of the products of a prompt."""

    bandwidth: float
    rate: float


def verify(
    config: ModelConfig, name: str, device: Device, dtype: str, size: Size, say: Callable[[str], None] = lambda _: None
) -> Section:
    """Generate and train with models of the kind of `config` that fit here, and hold the predictions to it.

    `device` is this machine as `this_machine(dtype)` measured it. Each piece of work has a process of its own.
    """
    small, trained = shrunk(config, MOST_GENERATED), shrunk(config, MOST_TRAINED)
    say(f"generating with {describe(small)}")
    generated = _generation(small, name, device, dtype, size)
    say(f"training {describe(trained)}")
    figures = (*generated, *_training(trained, name, device, dtype, size))
    notes = (
        f"generated with {describe(small)}; trained: {describe(trained)}; weights are random",
        "launching is measured by the same work on the same model with all widths small; prefill takes the time of "
        "products and blocks of experts with as many rows as they get",
        f"limits and generation are measured in turn, {ROUNDS} times; the middle ratio counts",
        "memory is that of the whole process; the library's share is what the process held after the same work on the "
        "model with all widths small",
    )
    return Section("verify", "Predicted and measured on this machine", figures, notes)


def describe(config: ModelConfig) -> str:
    """A shape in words."""
    moe, layers = config.moe, f"{config.n_layers} layers of width {config.width}"
    experts = f", {moe.top_k} of {moe.n_routed} experts of width {moe.expert_width}" if config.moe_layers else ""
    return f"{layers}{experts}, {parameters(config) / 1e6:,.0f} M parameters"


def compared(
    key: str, label: str, predicted: float | int, measured: float | int, unit: str, note: str = ""
) -> tuple[Figure, ...]:
    """A prediction, what was measured, and the ratio of the two."""
    return (
        Figure(f"{key}.predicted", f"{label}, predicted", predicted, unit, note=note),
        Figure(f"{key}.measured", f"{label}, measured", measured, unit),
        Figure(f"{key}.ratio", f"{label}, predicted / measured", predicted / measured),
    )


def _generation(config: ModelConfig, name: str, device: Device, dtype: str, size: Size) -> tuple[Figure, ...]:
    blueprint, precision, kv = blueprint_of(config, name, ""), parse_precision(dtype), FORMATS[dtype]
    rounds = partial(_rounds, blueprint, dtype, size)
    found = in_child(generator, (config, dtype, *size, NEW), (narrow(config), dtype, *size, NEW), rounds)
    launching = best_rates(generator(narrow(config), dtype, *size, NEW), TRIES)
    tokens = {"decode": size.batch, "prefill": size.batch * size.length}

    def bound(work: str, limits: Limits) -> float:
        overhead, past = tokens[work] / getattr(launching, work) / config.n_layers, size.length + NEW // 2
        rates = {**device.rates, dtype: limits.rate} if work == "prefill" else device.rates
        here = device._replace(bandwidth=limits.bandwidth, rates=rates, overhead=overhead)
        section = speed(blueprint, precision, kv, past, size.batch, size.length, here, 1)
        return section.value(f"{work}.tokens_per_second")

    def middle(work: str) -> tuple[Figure, ...]:
        pairs = [(bound(work, limits), getattr(rates, work)) for limits, rates in found.result]
        predicted, measured = sorted(pairs, key=lambda pair: pair[0] / pair[1])[len(pairs) // 2]
        return compared(work, work, predicted, measured, "tokens/s", "an upper bound")

    whole = memory(blueprint, precision, kv, size.length + NEW, size.batch, None, Layout())
    return (
        *middle("decode"),
        *middle("prefill"),
        *_memory("generation_memory", "memory of generation", whole, "total", found),
    )


def _rounds(blueprint: Blueprint, dtype: str, size: Size, generate: Callable[[], Rates]) -> list[tuple[Limits, Rates]]:
    """What the machine could do, the better of before and after, and what it did, several times.

    A shared machine is faster in one minute than in the next.
    """
    limits, done = [_limits(blueprint, dtype, size)], list[Rates]()
    for _ in range(ROUNDS):
        done.append(best_rates(generate, TRIES))
        limits.append(_limits(blueprint, dtype, size))
    return [(Limits(*map(max, *around)), rates) for around, rates in zip(pairwise(limits), done, strict=True)]


def _limits(blueprint: Blueprint, dtype: str, size: Size) -> Limits:
    rate = rate_for(blueprint, dtype, size.batch * size.length, size.batch)
    return Limits(vector_bandwidth(DTYPES[dtype]), rate)


def _memory(key: str, label: str, plan: Section, total: str, found: Measured) -> tuple[Figure, ...]:
    """The whole process, and the library's share of it, which is measured."""
    share = found.library_bytes
    beside, measured = _number(plan, total) - _number(plan, "library"), found.peak_bytes + share
    of_it = Figure(f"{key}.library", f"{label}, the library's share in both", share, "B")
    return (of_it, *compared(key, label, beside + share, measured, "B"))


def _number(plan: Section, key: str) -> int:
    value = plan.value(key)
    assert isinstance(value, int)
    return value


def _training(config: ModelConfig, name: str, device: Device, dtype: str, size: Size) -> tuple[Figure, ...]:
    blueprint, precision, kv = blueprint_of(config, name, ""), parse_precision(dtype), FORMATS[dtype]
    found = in_child(train_steps, (config, dtype, "muon", *size), (narrow(config), dtype, "muon", *size, 1))
    bound = speed(blueprint, precision, kv, size.length, size.batch, size.length, device, 1)
    how = Training(size.batch, size.length, "muon", FORMATS[dtype])
    whole = memory(blueprint, precision, kv, size.length, size.batch, how, Layout())
    tokens = size.batch * size.length
    launching = tokens / train_steps(narrow(config), dtype, "muon", *size)
    optimizer = muon_flops(blueprint) / device.rate("bfloat16")
    predicted = tokens / (bound.value("training.seconds") + optimizer + launching)
    note = "an upper bound: products of the model and of Muon at the machine's rate, and launching"
    return (
        *compared("training", "training", predicted, found.result, "tokens/s", note),
        *_memory("training_memory", "memory of training", whole, "training.total", found),
    )
