"""Common mass loss: experts that all tasks share should not do the work of those that are a task's own."""

import torch

from moekit.config.routing import TaskRouting, TwoPoolRouting
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.balance.shares import mean_over_tokens
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Rule(BalanceRule):
    """coefficient * mean over tokens of (sum of g_i over common experts) / (sum of g_i over all). It balances nothing.

    g are the scores of all experts: also a token that chose common experts alone is pushed away from them. In two
    pools each pool's scores sum to 1, which says nothing; there g are the scores of the chosen.
    """

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""]:  # noqa: ARG002
        g = routing.scores
        experts = torch.arange(routing.n_experts, device=g.device).expand(g.shape)
        if len(self.pools) > 1:
            experts = routing.experts
            g = g.gather(-1, experts.clamp_min(0)) * (experts >= 0)
        routing_rule = self.config.routing
        assert isinstance(routing_rule, TaskRouting | TwoPoolRouting)
        common = (g * (experts < routing_rule.n_common)).sum(dim=-1)
        return self.rule.coefficient * mean_over_tokens(common / g.sum(dim=-1).clamp_min(1e-20), routing)
