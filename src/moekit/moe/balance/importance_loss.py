"""Importance loss (arXiv 1701.06538, eqs 6-7): every expert should have the same sum of weights."""

from moekit.moe.balance.shares import weight_by_sequence
from moekit.moe.balance.spread import SpreadLoss
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Rule(SpreadLoss):
    """coefficient * (1 + CV(Importance)^2), Importance_i = sum over tokens of G(x)_i, 0 where i was not chosen.

    CV is that of a population, as in the authors' code. Many tokens with small weights are as important as few with
    large ones: a load can stay uneven, and the paper adds `load_loss`.
    """

    def mass(self, routing: Routing) -> Float[Tensor, "B E"]:
        return weight_by_sequence(routing)
