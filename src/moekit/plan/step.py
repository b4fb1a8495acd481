"""What one pass through a model reads and computes, and the least time that takes."""

from collections.abc import Mapping
from typing import NamedTuple

from moekit.config.errors import check
from moekit.plan.blueprint import Blueprint, Weight
from moekit.plan.compute import decode_score_flops, score_flops
from moekit.plan.devices import Device
from moekit.plan.experts import distinct_experts
from moekit.plan.memory import cache_bytes
from moekit.plan.precision import Format, Precision

LARGEST = 10**12
"""The largest size that is taken for one: more is a slip, and floating point would not survive it."""


class Step(NamedTuple):
    """One pass: bytes read of weights that every token meets, of distinct experts, of what each sequence has for itself
    (cache and embedding rows); FLOPs by the type of the products."""

    weights: int
    experts: int | float
    sequences: int
    flops: Mapping[str, int]

    @property
    def bytes(self) -> int | float:
        """All that is read."""
        return self.weights + self.experts + self.sequences

    @property
    def all_flops(self) -> int:
        """All that is computed."""
        return sum(self.flops.values())

    def times(self, factor: int) -> "Step":
        """`factor` such passes in one."""
        flops = {compute: factor * count for compute, count in self.flops.items()}
        return Step(factor * self.weights, factor * self.experts, factor * self.sequences, flops)


class LeastTime(NamedTuple):
    """Seconds that a step takes at least: memory and computing overlap, launching does not."""

    memory: float
    compute: float
    overhead: float

    @property
    def seconds(self) -> float:
        """max(memory, compute) + overhead."""
        return max(self.memory, self.compute) + self.overhead

    @property
    def binding(self) -> str:
        """The term that takes longest."""
        return max(("memory", "compute", "overhead"), key=lambda term: getattr(self, term))


def least_time(step: Step, device: Device, n_devices: int, launches: int) -> LeastTime:
    """The bound for `step` split perfectly over the devices; `launches` layers are launched on all of them at once."""
    memory = step.bytes / (device.bandwidth * n_devices)
    compute = sum(flops / device.rate(name) for name, flops in step.flops.items()) / n_devices
    return LeastTime(memory, compute, device.overhead * launches)


def decode_step(blueprint: Blueprint, precision: Precision, kv: Format, context: int, batch: int) -> Step:
    """The next token of `batch` sequences with `context` tokens in the cache; a latent cache with absorbed products."""
    scores = sum(decode_score_flops(a, context) for a in blueprint.attentions)
    flops = _product_flops(blueprint, precision, batch, batch)
    _add(flops, _score_type(precision), batch * scores)
    own = embedding_row_bytes(blueprint, precision) + cache_bytes(blueprint, kv, context, 1)
    return _step(blueprint, precision, batch, batch * own, flops)


def forward_step(
    blueprint: Blueprint, precision: Precision, kv: Format, length: int, batch: int, logits: int = 1
) -> Step:
    """`batch` sequences of `length` tokens at once, expanded attention, logits for the last `logits` tokens of each.

    Keys and values are written once to the cache; that they are also read from it is left to the chip's own memory.
    """
    tokens = batch * length
    scores = sum(score_flops(a, length) for a in blueprint.attentions)
    flops = _product_flops(blueprint, precision, tokens, batch * logits)
    _add(flops, _score_type(precision), batch * scores)
    own = length * embedding_row_bytes(blueprint, precision) + cache_bytes(blueprint, kv, length, 1)
    return _step(blueprint, precision, tokens, batch * own, flops)


def embedding_row_bytes(blueprint: Blueprint, precision: Precision) -> int:
    """Bytes that the lookups of one token read: rows, not tables."""
    rows = (w._replace(shape=(1, *w.shape[1:]), count=w.used) for w in blueprint.weights if w.kind == "lookup")
    return sum(precision.bytes_of(row) for row in rows)


def expert_bytes(blueprint: Blueprint, precision: Precision) -> tuple[float, ...]:
    """Bytes of one expert of each mixture, by its share of the routed parameters where mixtures differ."""
    stored = sum(precision.bytes_of(weight) for weight in blueprint.weights if weight.part == "routed")
    parameters = sum(m.layers * m.n_routed * m.expert for m in blueprint.mixtures)
    return tuple(stored * m.expert / parameters for m in blueprint.mixtures)


def check_sizes(**sizes: int | float) -> None:
    """Raise a ConfigError naming the first size that is not between 1 and `LARGEST`."""
    for key, size in sizes.items():
        check(1 <= size <= LARGEST, key, f"{size} is no size", f"1 to {LARGEST:,}")


def _step(blueprint: Blueprint, precision: Precision, tokens: int, own: int, flops: dict[str, int]) -> Step:
    always = sum(
        precision.bytes_of(_as_read(w)) for w in blueprint.weights if w.part != "routed" and w.kind != "lookup"
    )
    each = zip(blueprint.mixtures, expert_bytes(blueprint, precision), strict=True)
    experts = sum(m.layers * distinct_experts(m.n_routed, m.top_k, tokens) * size for m, size in each)
    return Step(always, experts, own, flops)


def _as_read(weight: Weight) -> Weight:
    """A tied head is stored with the embedding, and read whole nevertheless; what no token meets is not read."""
    return weight._replace(count=weight.used)


def _product_flops(blueprint: Blueprint, precision: Precision, tokens: int, logits: int) -> dict[str, int]:
    """2 FLOPs for each number of a matrix and token, by the type of the product; the head for `logits` tokens only."""
    flops: dict[str, int] = {}
    for weight in blueprint.weights:
        if weight.kind == "product" and weight.used:
            times = logits if weight.part == "head" else tokens
            _add(flops, precision.format_of(weight).compute, 2 * weight.numel * weight.used * times)
    return flops


def _add(flops: dict[str, int], compute: str, count: int) -> None:
    flops[compute] = flops.get(compute, 0) + count


def _score_type(precision: Precision) -> str:
    """The type of q k and of the sum over v: not FP8 (arXiv 2412.19437, section 3.3.1)."""
    return "bfloat16" if precision.default.compute == "fp8" else precision.default.compute
