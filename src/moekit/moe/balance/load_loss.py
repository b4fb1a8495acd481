"""Load loss (arXiv 1701.06538, eqs 8-11): every expert should be given equally many tokens."""

import torch

from moekit.moe.balance.shares import sum_by_sequence
from moekit.moe.balance.spread import SpreadLoss
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor

SMALLEST = 1e-6
"""A deviation below it is taken for it: noise that decides nothing."""


class Rule(SpreadLoss):
    """coefficient * (1 + CV(Load)^2), Load_i = sum over tokens of P(x, i), which unlike a count has a gradient.

    P(x, i) = Phi((clean_i - kth_excluding(H, k, i)) / deviation_i): the probability that expert i is among the k best
    if its noise, and only its, is drawn again. Where k = E every expert is always chosen, and P is 1.
    """

    def mass(self, routing: Routing) -> Float[Tensor, "B E"]:
        assert routing.drawn is not None
        mean, deviation, noisy = routing.drawn
        p = torch.ones_like(mean)
        if self.config.top_k < routing.n_experts:
            threshold = kth_excluding(noisy, self.config.top_k)
            p = torch.special.ndtr((mean - threshold) / deviation.clamp_min(SMALLEST))
        return sum_by_sequence(p if routing.mask is None else p * routing.mask.unsqueeze(-1), routing)


def kth_excluding(noisy: Float[Tensor, "T E"], k: int) -> Float[Tensor, "T E"]:
    """For each expert the k-th best of the others' H; k is below E."""
    best = noisy.topk(k + 1, dim=-1).values
    kth, next_best = best[:, k - 1 : k], best[:, k:]
    return torch.where(noisy > next_best, next_best, kth)
