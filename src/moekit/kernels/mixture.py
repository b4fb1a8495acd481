"""A mixture for few tokens as a job of a compiled call: scores, choice, the chosen experts and the shared ones."""

from array import array
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.few_rows import Place
from moekit.kernels.token import MIXTURE as MIXTURE_JOB
from moekit.kernels.token import Found, job
from moekit.tensors import Float, Int, Tensor

CHOICE, MIXTURE = Struct("=4q2Q5q2d3i4x"), Struct("=" + 6 * "Qqqqii" + "Q2q3Q3q")
"""How `moekit_choice` and the rest of `moekit_mixture` of token.h lie in memory."""

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
"""How a logit becomes a score, in the order of mixture.cpp."""

NOWHERE: Place = (0, 0, 0, 0, 16, 0)

NO_CHOICE = bytes(CHOICE.size)


class Way(NamedTuple):
    """How experts are chosen and weighed: see the fields of the same names of `TopKRouting`.

    `late`: the chosen experts alone are scored. A group is worth the sum of its best `summed` experts.
    """

    score: str
    late: bool
    top_k: int
    n_groups: int
    top_k_groups: int
    summed: int
    renormalise: bool
    epsilon: float
    scale: float


class Where(NamedTuple):
    """Where a layer's experts lie: the matrices of the first, and the bytes from one expert to the next; or, where each
    was read on its own, a table of both addresses of each, 0 for those that were not."""

    gate_up: Place
    down: Place
    gate_up_step: int
    down_step: int
    table: "array[int] | None"


class Shared(NamedTuple):
    """The shared experts as one block, to which each token comes by the sigmoid of `gate` (None: by 1)."""

    gate_up: Place
    down: Place
    gate: Place | None = None


class Size(NamedTuple):
    """Of a choice for `n` tokens."""

    n: int
    n_experts: int
    top_k: int

    @property
    def numbers(self) -> int:
        """Weights, scores and logits."""
        return self.n * (2 * self.n_experts + self.top_k)

    @property
    def places(self) -> int:
        """Chosen experts."""
        return self.n * self.top_k


class Chosen(NamedTuple):
    """Each token's experts, best first, and their weights; scores and logits of all experts in float32."""

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]


class Mixture(NamedTuple):
    """The job, the size of its choice, and what must live until it is done."""

    job: bytes
    size: Size
    kept: list[object]


def room(sizes: Sequence[Size], states: Tensor | None = None) -> Found:
    """Room for the choices of several jobs, one behind the other."""
    numbers = torch.empty(sum(size.numbers for size in sizes), dtype=torch.float32)
    return Found(numbers, torch.empty(sum(size.places for size in sizes), dtype=torch.int64), states)


def chosen(sizes: Sequence[Size], found: Found) -> list[Chosen]:
    """The choices that lie one behind the other."""
    parts = [part for n, n_experts, top_k in sizes for part in (n * top_k, n * n_experts, n * n_experts)]
    numbers, places = iter(found.numbers.split(parts)), found.places.split([size.places for size in sizes])
    return [
        Chosen(own.view(size.n, -1), *(next(numbers).view(size.n, -1) for _ in range(3)))
        for size, own in zip(sizes, places, strict=True)
    ]


def mixture(
    x: Float[Tensor, "*shape D"],
    y: Float[Tensor, "*shape D"],
    centroids: Place,
    way: Way,
    steering: tuple[Float[Tensor, " E"] | None, Float[Tensor, " E"] | None],
    where: Where,
    shared: Shared | None,
    before: Sequence[Size] | None = None,
) -> Mixture:
    """The job that puts the mixture of `x` into `y`, or adds it where other choices come `before` that of this one.

    Both are of one type, bfloat16 or float32, and contiguous. Experts are ranked by score * factor + bias (`steering`:
    bias, factor), the first of equal ones before the others; their weights come from the scores alone.
    """
    size = Size(x.numel() // x.shape[-1], centroids[1], way.top_k)
    weights, places = sum(each.numbers for each in before or ()), sum(each.places for each in before or ())
    scores = weights + size.n * size.top_k
    kept = [None if each is None else each.float().contiguous() for each in steering]
    choice = CHOICE.pack(
        scores + size.n * size.n_experts,
        scores,
        weights,
        places,
        *(0 if each is None else each.data_ptr() for each in kept),
        size.n_experts,
        *way[2:6],
        way.epsilon,
        way.scale,
        SCORES.index(way.score),
        way.late,
        way.renormalise,
    )
    job = choice_and_blocks(x, y, choice, centroids, where, shared, before is not None)
    return Mixture(job, size, [*kept, where.table])


def block(x: Float[Tensor, "*shape D"], y: Float[Tensor, "*shape D"], gate_up: Place, down: Place, adds: bool) -> bytes:
    """As `mixture`, of one block to which all tokens come."""
    where = Where(NOWHERE, NOWHERE, 0, 0, None)
    return choice_and_blocks(x, y, NO_CHOICE, NOWHERE, where, Shared(gate_up, down), adds)


def choice_and_blocks(
    x: Tensor, y: Tensor, choice: bytes, centroids: Place, where: Where, shared: Shared | None, adds: bool
) -> bytes:
    """The job around a choice."""
    gate_up, down, gate = (NOWHERE, NOWHERE, None) if shared is None else shared
    to, width = y.data_ptr(), x.shape[-1]
    blocks = MIXTURE.pack(
        *centroids,
        *where.gate_up,
        *where.down,
        *gate_up,
        *down,
        *(gate or NOWHERE),
        0 if where.table is None else where.table.buffer_info()[0],
        where.gate_up_step,
        where.down_step,
        x.data_ptr(),
        to if adds else 0,
        to,
        x.numel() // width,
        width,
        x.dtype == torch.bfloat16,
    )
    return job(MIXTURE_JOB, choice + blocks)
