"""The memory of one training step as moekit does it: what is kept, what is added at its peaks, and on each device."""

from typing import Literal, NamedTuple

from moekit.config.errors import ConfigError
from moekit.plan.activations import Batch, backward_peak, loss_peak, saved
from moekit.plan.blueprint import Blueprint, Weight
from moekit.plan.figure import Figure
from moekit.plan.layout import Layout
from moekit.plan.precision import FORMATS, Format

LIBRARY = 350_000_000
"""What a process holds before any model: Python and torch 230 MB, after some work on a tiny model 350 to 400 MB, mostly
compiled products (resident memory, torch 2.13 on a CPU with two threads)."""

UPDATE = 2
"""Bytes of a number of Muon's update: it is orthogonalised in bfloat16 wherever a processor multiplies that fast."""

LOST = 1.15
"""What blocks take of a heap for each byte of them, which find little room between pieces that were freed before:
measured with ten shapes, where resident memory came within 10 % of the plan."""


class Training(NamedTuple):
    """`sequences` of `length` tokens at once, `micro_batches` times in a step.

    `compute` is the type of weights and activations; with `master`, the optimizer moves float32 copies of the weights.
    `moments` is the format of the optimizer's state (bfloat16 in arXiv 2412.19437, section 3.3.3). `recompute` keeps
    the inputs of blocks only, which moekit's own step does not do.
    """

    sequences: int
    length: int
    optimizer: Literal["adamw", "muon"] = "muon"
    compute: Format = FORMATS["bfloat16"]
    master: bool = True
    moments: Format = FORMATS["float32"]
    micro_batches: int = 1
    recompute: bool = False

    @property
    def batch(self) -> Batch:
        """What is computed at once."""
        return Batch(self.sequences, self.length, self.compute.bits // 8)

    @property
    def tokens(self) -> int:
        """Tokens computed at once."""
        return self.sequences * self.length

    @property
    def keeps_masters(self) -> bool:
        """Whether masters are tensors of their own: in float32 the weights are the masters."""
        return self.master and self.compute.bits < 32

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one number of the gradient that the optimizer reads: several micro-batches are summed in float32."""
        return 4 if self.master and self.micro_batches > 1 else self.batch.width

    def check(self) -> None:
        """Raise a ConfigError that names the value which cannot be."""
        for key in ("sequences", "length", "micro_batches"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"{getattr(self, key)} must be at least 1")
        if self.optimizer not in ("adamw", "muon"):
            raise ConfigError("optimizer", f"{self.optimizer!r} is not one of adamw, muon")
        for key in ("compute", "moments"):
            form: Format = getattr(self, key)
            if key == "compute" and form.quantised:
                raise ConfigError(key, f"{form.name} is not a type that gradients are computed in", "use bfloat16")


class Bytes(NamedTuple):
    """What a step holds from its start to its end, and what it adds at the two moments that need most.

    `large` is what the optimizer allocates besides the gradients, nothing of it twice.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    backward: int
    optimizer: int
    large: int

    @property
    def kept(self) -> int:
        """Held all the time."""
        return self.weights + self.masters + self.moments

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.kept + max(self.backward, self.optimizer)

    @property
    def process(self) -> int:
        """What a process takes that trains with glibc's allocator, which then keeps what is freed."""
        phase = max(self.backward, self.gradients)
        return self.kept + round(max(LOST * phase, phase + LOST * self.large))


def moments_of(weight: Weight, training: Training) -> int:
    """Bytes of the optimizer's state: AdamW two moments, Muon one for the matrices between embedding and head."""
    number = 1 if training.optimizer == "muon" and is_muon(weight) else 2
    return number * training.moments.bytes_of(weight.shape, weight.count)


def is_muon(weight: Weight) -> bool:
    """Whether Muon moves these tensors: matrices, but not embedding, head and router, whose rows are used singly."""
    apart = weight.part in ("embedding", "head", "router") or weight.name in ("centroids", "gate of the shared experts")
    return weight.kind == "product" and not apart


def training_bytes(blueprint: Blueprint, training: Training) -> Bytes:
    """The bytes of a step on one device that holds everything, prediction modules included."""
    training.check()
    n, width = sum(w.stored for w in blueprint.weights), training.batch.width
    gradients = n * training.gradient_bytes
    muon = _muon(blueprint) if training.optimizer == "muon" else Muon(0, 0, 0)
    return Bytes(
        n * width,
        n * 4 * training.keeps_masters,
        sum(moments_of(w, training) for w in blueprint.weights),
        gradients,
        activations(blueprint, training),
        _backward(blueprint, training, n) + gradients * (training.micro_batches > 1),
        gradients + muon.updates + max(muon.momentum, muon.stack),
        sum(muon),
    )


def activations(blueprint: Blueprint, training: Training) -> int:
    """Bytes kept from forward to backward; with `recompute` the inputs of blocks, and one block in full."""
    kept = saved(blueprint, training.batch)
    if not training.recompute:
        return kept
    inputs = blueprint.layers * training.batch.tokens * blueprint.width * training.batch.width
    return min(inputs + kept // max(blueprint.layers, 1), kept)


def _backward(blueprint: Blueprint, training: Training, n: int) -> int:
    """The most of: the loss on top of what is kept, the last block's backward, the end with all gradients."""
    batch, layers = training.batch, max(blueprint.layers, 1)
    kept, head = activations(blueprint, training), blueprint.vocab_size * blueprint.width * batch.width
    block, inside = backward_peak(blueprint, batch), sum(w.stored for w in blueprint.weights if _inside(w))
    at_the_start = kept + block + inside // layers * batch.width
    at_the_end = n * batch.width + (kept - head) // layers + block
    return max(kept - head + loss_peak(blueprint, batch), at_the_start, at_the_end)


def _inside(weight: Weight) -> bool:
    return weight.part not in ("embedding", "head", "prediction")


class Muon(NamedTuple):
    """Bytes that Muon holds for a moment: the updates of all matrices; the float32 gradient of the largest tensor,
    shortened, and its blend with the momentum; Newton-Schulz on the largest stack of one shape: the stack, two rounds
    of it, and three of its Grams."""

    updates: int
    momentum: int
    stack: int


def _muon(blueprint: Blueprint) -> Muon:
    stacks: dict[tuple[int, ...], int] = {}
    moved = [w for w in blueprint.weights if is_muon(w)]
    for w in moved:
        short = min(w.shape)
        key = tuple(sorted(w.shape))
        stacks[key] = stacks.get(key, 0) + 3 * UPDATE * (w.stored + short * short * w.count)
    largest = max((w.stored // _layers_with(blueprint, w) for w in moved), default=0)
    return Muon(UPDATE * sum(w.stored for w in moved), 8 * largest, max(stacks.values(), default=0))


def _layers_with(blueprint: Blueprint, weight: Weight) -> int:
    """Layers that have such tensors: those of all experts of one layer are one tensor."""
    mixed = sum(m.layers for m in blueprint.mixtures)
    known = {"routed": mixed, "shared": mixed, "dense": blueprint.layers - mixed}
    return max(known.get(weight.part, blueprint.layers), 1) if weight.part != "prediction" else 1


def muon_flops(blueprint: Blueprint) -> int:
    """FLOPs of Muon in one step: five rounds of Newton-Schulz on every m x n matrix, m <= n, 4 m^2 n + 2 m^3 each."""
    sides = [(min(w.shape), max(w.shape), w.count) for w in blueprint.weights if is_muon(w)]
    return sum(5 * count * (4 * m * m * n + 2 * m**3) for m, n, count in sides)


GRADIENTS = "of the compute type; several micro-batches are summed in float32"


def training_figures(blueprint: Blueprint, training: Training) -> list[Figure]:
    """The bytes of a step as figures."""
    held = training_bytes(blueprint, training)
    n = sum(w.stored for w in blueprint.weights)
    batch, name = training.batch, training.compute.name
    where = f"{batch.sequences:,} x {batch.length:,} tokens at once in {name}"
    recomputed = ", inputs of blocks and one block in full" if training.recompute else ""
    muon = training.optimizer == "muon"
    rows = (
        ("weights", "weights", held.weights, "n x bytes", f"{n:,} x {batch.width}", f"{name}, prediction modules too"),
        ("masters", "master weights", held.masters, "4 n", f"4 x {n:,}", "none where float32 weights are the masters"),
        ("moments", "optimizer's moments", held.moments, *_moments_in_words(blueprint, training)),
        ("gradients", "gradients", held.gradients, "n x bytes", f"{n:,} x {training.gradient_bytes}", GRADIENTS),
        (
            "activations",
            "kept for the backward",
            held.activations,
            "tokens x (sum over layers + 3 d) + V d",
            f"{batch.tokens:,} tokens",
            f"{where}; moekit's own gradients of norm, attention, experts and loss, with compiled kernels{recomputed}",
        ),
        (
            "backward",
            "gradient phase, at its peak",
            held.backward,
            "max(kept + loss, kept + block, gradients + block)",
            f"{where}",
            "logits in chunks of 512 rows",
        ),
        (
            "optimizer_step",
            "optimizer's phase, at its peak",
            held.optimizer,
            "gradients + Muon's updates + its largest stack",
            f"{held.gradients:,} + {held.optimizer - held.gradients:,}",
            "Newton-Schulz on all matrices of one shape at once" if muon else "AdamW in place",
        ),
    )
    return [Figure(f"training.{key}", label, value, "B", *words) for key, label, value, *words in rows] + _peaks(held)


def _peaks(held: Bytes) -> list[Figure]:
    return [
        Figure(
            "training.total",
            "training, at its peak",
            held.process + LIBRARY,
            "B",
            f"kept + max({LOST} phase, phase + {LOST} x optimizer's own) + library; phase: gradients, or their phase",
            f"phase {max(held.backward, held.gradients):,}, optimizer's own {held.large:,}, library {LIBRARY:,}",
            "what a process takes on a CPU with glibc, which keeps freed memory: large blocks seldom fit into it",
        ),
        Figure(
            "training.alive",
            "training, tensors alive at once",
            held.peak,
            "B",
            "weights + masters + moments + the larger phase",
            f"{held.kept:,} + max({held.backward:,}, {held.optimizer:,})",
            "what tensors take where freed memory is used again to the last byte",
        ),
    ]


def _moments_in_words(blueprint: Blueprint, training: Training) -> tuple[str, str, str]:
    n = sum(w.stored for w in blueprint.weights)
    if training.optimizer == "adamw":
        return "2 moments of each parameter", f"2 x {n:,}", f"AdamW, {training.moments.name}"
    m = sum(w.stored for w in blueprint.weights if is_muon(w))
    note = f"{training.moments.name}; Muon for the matrices, AdamW for embedding, head, routers and vectors"
    return "1 moment of matrices + 2 of all else", f"{m:,} + 2 x {n - m:,}", note


def training_on_device(blueprint: Blueprint, training: Training, layout: Layout) -> dict[str, int]:
    """Bytes on the fullest device by what they are, nothing overlapping, with the stages of ZeRO.

    A pipeline keeps as many micro-batches in flight as it has stages (1F1B), so that activations divide by `tensor`
    only; tokens are taken to be spread evenly over experts.
    """
    found = {"weights": 0, "optimizer": 0, "gradients": 0}
    width = training.batch.width
    for w in blueprint.weights:
        over, copies = layout.divisor(w), layout.copies(w)
        state = w.stored * 4 * training.keeps_masters + moments_of(w, training)
        found["weights"] += -(-w.stored * width // (over * (copies if layout.zero >= 3 else 1)))
        found["optimizer"] += -(-state // (over * (copies if layout.zero >= 1 else 1)))
        gradients = w.stored * training.gradient_bytes
        found["gradients"] += -(-gradients // (over * (copies if layout.zero >= 2 else 1)))
    return {**found, "activations": activations(blueprint, training) // layout.tensor}
