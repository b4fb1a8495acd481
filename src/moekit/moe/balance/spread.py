"""Losses of how unevenly something is spread over the experts: coefficient * (1 + CV^2), CV = deviation / mean."""

from collections.abc import Sequence

import torch

from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import mean_over_scope, real_tokens
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class SpreadLoss(BalanceRule):
    """A rule says in `mass` what is spread. The 1 has no gradient and makes the loss its coefficient where CV is 0."""

    def mass(self, routing: Routing) -> Float[Tensor, "B E"]:
        """What each expert has of each sequence, summed over its real tokens."""
        raise NotImplementedError

    def count(self, routing: Routing) -> Float[Tensor, " E"]:
        return self.mass(routing).detach().sum(dim=0)

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:
        rule, mass = self.rule, self.mass(routing)
        if rule.scope != "sequence":
            mass = mass.sum(dim=0, keepdim=True)
        if rule.scope != "batch" or step is None:
            return rule.coefficient * mean_over_scope(unevenness(mass, self.pools), routing, rule.scope)
        # CV^2 is no sum over tokens: the value is that of the step's total, the gradient goes through the part that
        # this micro-batch has in it, and is whole once the objective multiplies it by the micro-batch's share.
        total = step.counts + (mass - mass.detach())
        whole = unevenness(total, self.pools).sum()
        share = real_tokens(routing).sum().clamp_min(1) / max(step.tokens, 1)
        return rule.coefficient * (whole.detach() + (whole - whole.detach()) / share)


def unevenness(mass: Float[Tensor, "G E"], pools: Sequence[int]) -> Float[Tensor, " G"]:
    """1 + CV^2 = N sum m_i^2 / (sum m_i)^2, with the variance of a population; the mean over pools; 0 for no mass."""
    found = [
        part.shape[-1] * part.square().sum(dim=-1) / part.sum(dim=-1).square().clamp_min(1e-20)
        for part in mass.split(list(pools), dim=-1)
    ]
    return torch.stack(found).mean(dim=0)
