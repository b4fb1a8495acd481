"""A mixture for few tokens as a job of a compiled call: scores, choice, the chosen experts and the shared ones."""

from array import array
from struct import Struct, calcsize
from typing import NamedTuple

import torch

from moekit.kernels.choice import CHOICE, Chosen, Steering, Way, packed_choice
from moekit.kernels.few_rows import Place
from moekit.kernels.token import KIND, Found, job
from moekit.kernels.token import MIXTURE as MIXTURE_JOB
from moekit.tensors import Float, Tensor

BEFORE_ENDS = "=" + 6 * "Qqqqii" + "Q2q"

MIXTURE = Struct(BEFORE_ENDS + "3Q3q")
"""How what follows the choice in `moekit_mixture` of token.h lies in memory."""

FOUND, ENDS = Struct("=4Q"), Struct("=3Q")
"""Of a job, where it puts what the choice finds; where it reads, to what it adds and where it writes."""

TO_FOUND, TO_ENDS = KIND.size, KIND.size + CHOICE.size + calcsize(BEFORE_ENDS)
"""The bytes of a job before them."""

NOWHERE: Place = (0, 0, 0, 0, 16, 0)

NO_CHOICE = bytes(CHOICE.size)


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


class Mixture(NamedTuple):
    """The job, the size of its choice, and what must live until it is done."""

    job: bytes
    size: Size
    kept: list[object]


def room(size: Size, count: int, states: Tensor | None = None) -> Found:
    """Room for `count` choices of one size, one behind the other."""
    numbers = torch.empty(count, size.numbers, dtype=torch.float32)
    return Found(numbers, torch.empty(count, size.n, size.top_k, dtype=torch.int64), states)


def chosen(size: Size, found: Found) -> list[Chosen]:
    """The choices that lie one behind the other."""
    n, n_experts, top_k = size
    weights, scores, logits = found.numbers.split((n * top_k, n * n_experts, n * n_experts), dim=1)
    shapes = ((found.places, top_k), (weights, top_k), (scores, n_experts), (logits, n_experts))
    parts = (part.view(-1, n, each).unbind() for part, each in shapes)
    return [Chosen(*each) for each in zip(*parts, strict=True)]


def room_for_one(size: Size) -> Chosen:
    """Room for one choice: with memory cold, views of one piece take twice as long to make as four pieces."""
    n, n_experts, top_k = size
    experts, weights = torch.empty(n, top_k, dtype=torch.int64), torch.empty(n, top_k, dtype=torch.float32)
    scores, logits = (torch.empty(n, n_experts, dtype=torch.float32) for _ in range(2))
    return Chosen(experts, weights, scores, logits)


def mixture(
    x: Float[Tensor, "*shape D"],
    y: Float[Tensor, "*shape D"],
    centroids: Place,
    way: Way,
    steering: Steering,
    where: Where,
    shared: Shared | None,
    before: int | None = None,
) -> Mixture:
    """The job that puts the mixture of `x` into `y`, or adds it where so many choices come `before` that of this one.

    Both are of one type, bfloat16 or float32, and contiguous. Of equal experts the first is before the others.
    """
    size = Size(x.numel() // x.shape[-1], centroids[1], way.top_k)
    weights, places = (before or 0) * size.numbers, (before or 0) * size.n * size.top_k
    scores = weights + size.n * size.top_k
    at = 4 * (scores + size.n * size.n_experts), 4 * scores, 4 * weights, 8 * places
    choice, kept = packed_choice(way, size.n_experts, steering, at)
    job = choice_and_blocks(x, y, choice, centroids, where, shared, before is not None)
    return Mixture(job, size, [*kept, where.table])


def block(x: Float[Tensor, "*shape D"], y: Float[Tensor, "*shape D"], gate_up: Place, down: Place, adds: bool) -> bytes:
    """As `mixture`, of one block to which all tokens come."""
    where = Where(NOWHERE, NOWHERE, 0, 0, None)
    return choice_and_blocks(x, y, NO_CHOICE, NOWHERE, where, Shared(gate_up, down), adds)


def aimed(job: bytes, x: Float[Tensor, "*shape D"], y: Float[Tensor, "*shape D"], chosen: Chosen) -> bytes:
    """The same job, which adds to nothing, for a call of its own: it puts the mixture of `x` into `y`, and the choice
    into `chosen`."""
    experts, weights, scores, logits = chosen
    found = FOUND.pack(logits.data_ptr(), scores.data_ptr(), weights.data_ptr(), experts.data_ptr())
    between = job[TO_FOUND + FOUND.size : TO_ENDS]
    return job[:TO_FOUND] + found + between + ENDS.pack(x.data_ptr(), 0, y.data_ptr()) + job[TO_ENDS + ENDS.size :]


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
