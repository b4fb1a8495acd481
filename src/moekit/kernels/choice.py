"""How compiled code is told to choose experts, and the choice of many tokens with its gradients (AVX512)."""

from struct import Struct
from typing import Any, NamedTuple

import torch

from moekit.kernels.experts import NUMBERS
from moekit.kernels.library import kernels
from moekit.kernels.logits import gradients
from moekit.tensors import Float, Int, Tensor

CHOICE, CHOSEN = Struct("=4q2Q5q2d3i4x"), Struct("=6Q2q")
"""How `moekit_choice` of token.h and the rest of `moekit_chosen` of routing.cpp lie in memory."""

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
"""How a logit becomes a score, in the order of choice.h."""

Steering = tuple[Float[Tensor, " E"] | None, Float[Tensor, " E"] | None]
"""Bias and factor: experts are ranked by score * factor + bias; their weights come from the scores alone."""


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

    @property
    def local(self) -> bool:
        """Whether a token's weights depend on the logits of the chosen experts alone, to the last bit of a float32."""
        return self.score != "softmax" or self.late or (self.renormalise and self.epsilon <= 1e-12)


class Chosen(NamedTuple):
    """Each token's experts, best first, and their weights; scores and logits of all experts in float32."""

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]


class Slopes(NamedTuple):
    """The gradients that come back to a choice."""

    weights: Float[Tensor, "T K"] | None
    scores: Float[Tensor, "T E"] | None
    logits: Float[Tensor, "T E"] | None


def packed_choice(
    way: Way, n_experts: int, steering: Steering, at: tuple[int, ...] = (0, 0, 0, 0)
) -> tuple[bytes, list[Tensor | None]]:
    """The choice as compiled code takes it, and what must live until it is done. `at`: so many bytes after those of a
    call begin its logits, scores, weights and experts."""
    kept = [None if each is None else each.detach().float().contiguous() for each in steering]
    packed = CHOICE.pack(
        *at,
        *(0 if each is None else each.data_ptr() for each in kept),
        n_experts,
        *way[2:6],
        way.epsilon,
        way.scale,
        SCORES.index(way.score),
        way.late,
        way.renormalise,
    )
    return packed, kept


def choose(x: Float[Tensor, "T D"], centroids: Float[Tensor, "E D"], way: Way, steering: Steering) -> Chosen:
    """The choice of T tokens, whose logits are products with the centroids. Call only where `logits.computes`."""
    compiled, (n, width), n_experts = kernels(), x.shape, len(centroids)
    logits, scores, weights = (torch.empty(n, size) for size in (n_experts, n_experts, way.top_k))
    experts = torch.empty(n, way.top_k, dtype=torch.long)
    choice, _kept = packed_choice(way, n_experts, steering)
    given = (x.data_ptr(), centroids.data_ptr(), NUMBERS[x.dtype], n, width, choice)
    places = (each.data_ptr() for each in (logits, scores, experts, weights))
    compiled.moekit_choose(*given, *places, torch.get_num_threads(), compiled.moekit_level())
    return Chosen(experts, weights, scores, logits)


def backward(
    x: Float[Tensor, "T D"], centroids: Float[Tensor, "E D"], way: Way, chosen: Chosen, slopes: Slopes
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "E D"]]:
    """The gradients of tokens and centroids, contiguous and of one type, that follow from `slopes`.

    Where only the chosen experts' logits have a slope, their centroids alone take part.
    """
    compiled, threads = kernels(), torch.get_num_threads()
    experts, _, scores, logits = chosen
    given = [None if each is None else each.float().contiguous() for each in slopes]
    fields = (logits, scores, experts, *given)
    places = (0 if each is None else each.data_ptr() for each in fields)
    choice, _ = packed_choice(way, len(centroids), (None, None))
    described = choice + CHOSEN.pack(*places, len(x), NUMBERS[x.dtype])
    ends: tuple[Any, ...] = threads, compiled.moekit_level()
    if slopes.weights is not None and slopes.scores is None and slopes.logits is None and way.local:
        of_x, of_centroids = torch.empty_like(x), torch.empty_like(centroids)
        matrices = x.data_ptr(), centroids.data_ptr(), x.shape[-1], of_x.data_ptr(), of_centroids.data_ptr()
        compiled.moekit_chosen_backward(described, *matrices, *ends)
        return of_x, of_centroids
    of_logits = torch.empty(logits.shape, dtype=x.dtype)
    compiled.moekit_slopes(described, of_logits.data_ptr(), *ends)
    return gradients(x, centroids, of_logits)
