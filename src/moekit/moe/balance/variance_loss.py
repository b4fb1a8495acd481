"""Variance loss: the variance of the load as articles on routing state it, made differentiable."""

from moekit.moe.balance.shares import share, sum_by_sequence
from moekit.moe.balance.spread import SpreadLoss
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Rule(SpreadLoss):
    """coefficient * E * sum P_i^2 = coefficient * (1 + E^2 Var(P)), P_i expert i's mean probability over the tokens.

    The variance of counts, which articles give, has no gradient. P has one, but can be even while counts are not.
    """

    def mass(self, routing: Routing) -> Float[Tensor, "B E"]:
        return sum_by_sequence(share(routing, self.pools), routing)
