"""Experts owned by tasks: a token chooses among those that all tasks share and those of its own task."""

import torch

from moekit.config.errors import InputError
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, normalised
from moekit.tensors import Bool, Float, Tensor

LOWEST = torch.finfo(torch.float32).min
"""The logit of an expert out of reach: its score is then exactly 0, and no loss on logits or scores can teach it."""


class Rule(SelectionRule):
    """s = softmax(u . e_i) over the experts within reach, the `top_k` best of them.

    The first `n_common` experts belong to every task, each `owned` that follow to one: task i reaches
    n_common + i owned, ..., n_common + (i + 1) owned - 1. That tasks have experts apart is the multi-gate mixture's
    idea (Ma et al., KDD 2018), here as a hard mask: whatever the weights or a selection bias, no token of one task
    is computed by the experts of another, and none of its gradients reaches them.
    """

    def logits(self, tokens: Tokens, centroids: Float[Tensor, "E D"] | None) -> Float[Tensor, "T E"]:
        return super().logits(tokens, centroids).masked_fill(self._out_of_reach(tokens), LOWEST)

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores = logits.softmax(dim=-1)
        ranking = tokens.steered(scores).masked_fill(self._out_of_reach(tokens), -torch.inf)
        experts = ranking.topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        return Selection(experts, normalised(weights) if self.rule.renormalise else weights, scores, ranking)

    def _out_of_reach(self, tokens: Tokens) -> Bool[Tensor, "T E"] | Bool[Tensor, "1 E"]:
        """Which experts belong to other tasks than the token's."""
        common, owned = self.rule.n_common, self.rule.owned(self.config.n_routed)
        place = torch.arange(self.config.n_routed, device=tokens.x.device)
        owner = (place - common).div(max(owned, 1), rounding_mode="floor")
        return (place >= common) & (owner != self._tasks(tokens).unsqueeze(-1))

    def _tasks(self, tokens: Tokens) -> Tensor:
        """The task of each token, [T]; [1] where there is but one."""
        last = self.rule.n_tasks - 1
        if tokens.tasks is None:
            if last > 0:
                hint = f"give each sequence one of 0 to {last}: layer(x, tasks=tasks), model(ids, tasks=tasks)"
                raise InputError("task routing needs the task of each sequence", hint)
            return torch.zeros(1, dtype=torch.long, device=tokens.x.device)
        outside = tokens.tasks[(tokens.tasks < 0) | (tokens.tasks > last)]
        if len(outside):
            raise InputError(f"task {int(outside[0])} is not one of the model's", f"tasks go from 0 to {last}")
        return tokens.tasks
