"""Entropy loss (arXiv 2403.07652): sharp scores, so that top-p routing needs few experts. It balances nothing."""

from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import mean_over_tokens, share
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Rule(BalanceRule):
    """coefficient * mean over tokens of -sum_i P_i log P_i, the mean of its pools' where there are several.

    Without it, the paper found, top-p routing learns flat scores and uses ever more experts.
    """

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        p = share(routing, self.pools)
        # p log p at 0, out of a task's reach, is 0 and must have a finite slope.
        terms = -(p * p.clamp_min(1e-20).log()).sum(dim=-1) / len(self.pools)
        return self.rule.coefficient * mean_over_tokens(terms, routing)
