"""A mixture for few tokens in one compiled call: scores, choice, the chosen experts and the shared ones."""

from array import array
from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.few_rows import MATRIX, Place
from moekit.kernels.library import library
from moekit.tensors import Float, Int, Tensor

CHOICE, MIXTURE = Struct("=6Q5q2d3i4x"), Struct("=" + 4 * "Qqqqii" + "QQqqq")
"""How `moekit_choice` and `moekit_mixture` of mixture.cpp lie in memory."""

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
"""How a logit becomes a score, in the order of mixture.cpp."""

NOWHERE: Place = (0, 0, 0, 0, 16, 0)

COMPUTED, NOT_IN_MEMORY = 0, 1
"""What the compiled call may return."""


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
    was read on its own, a table of both addresses of each, 0 for those that were not. `few`: rows for each expert up to
    which they are read row by row (0: any number)."""

    gate_up: Place
    down: Place
    gate_up_step: int
    down_step: int
    table: "array[int] | None"
    few: int


class Shared(NamedTuple):
    """The shared experts as one block, and the weight by which each token comes to it (None: 1)."""

    gate_up: Place
    down: Place
    weights: Float[Tensor, " T"] | None


class Mixed(NamedTuple):
    """What the experts make of the tokens, if they were `computed`; each token's experts, best first, and their
    weights; scores and logits of all experts in float32."""

    y: Float[Tensor, "T D"]
    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]
    status: int


def mixture_step(
    x: Float[Tensor, "T D"],
    centroids: Place,
    way: Way,
    steering: tuple[Float[Tensor, " E"] | None, Float[Tensor, " E"] | None],
    where: Where,
    shared: Shared | None,
) -> Mixed:
    """The mixture for tokens, bfloat16 or float32, where compiled code is there.

    Experts are ranked by score * factor + bias (`steering` is bias and factor), the first of equal ones before the
    others; their weights come from the scores alone.
    """
    compiled = library()
    assert compiled is not None
    x, n, n_experts, top_k = x.contiguous(), len(x), centroids[1], way.top_k
    y, experts = torch.empty_like(x), torch.empty(n, top_k, dtype=torch.int64)
    numbers = torch.empty(n * (2 * n_experts + top_k), dtype=torch.float32)
    weights, scores, logits = numbers.split([n * top_k, n * n_experts, n * n_experts])
    start = numbers.data_ptr()
    steered = [None if each is None else each.float().contiguous() for each in steering]
    choice = CHOICE.pack(
        start + 4 * n * (top_k + n_experts),
        start + 4 * n * top_k,
        start,
        experts.data_ptr(),
        *(0 if each is None else each.data_ptr() for each in steered),
        n_experts,
        *way[2:6],
        way.epsilon,
        way.scale,
        SCORES.index(way.score),
        way.late,
        way.renormalise,
    )
    table = 0 if where.table is None else where.table.buffer_info()[0]
    gate_up, down, gate = (NOWHERE, NOWHERE, None) if shared is None else shared
    mixture = MIXTURE.pack(
        *where.gate_up,
        *where.down,
        *gate_up,
        *down,
        table,
        0 if gate is None else gate.data_ptr(),
        where.gate_up_step,
        where.down_step,
        where.few,
    )
    rows = (x.data_ptr(), y.data_ptr(), x.dtype == torch.bfloat16, n)
    threads, level = torch.get_num_threads(), compiled.moekit_level()
    status = compiled.moekit_mixture_step(choice, MATRIX.pack(*centroids), mixture, *rows, threads, level)
    return Mixed(y, experts, weights.view(n, -1), scores.view(n, -1), logits.view(n, -1), status)
