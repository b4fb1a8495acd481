"""Balance loss of first choices: Switch (arXiv 2101.03961, eqs 4-6), GShard (arXiv 2006.16668, Algorithm 1)."""

import torch

from moekit.moe.balance import expert_loss
from moekit.moe.routing import Routing
from moekit.tensors import Int, Tensor


class Rule(expert_loss.Rule):
    """coefficient * E * sum f_i P_i: f_i the share of tokens whose best score is expert i's, P_i the mean probability.

    GShard's paper has 1 / E in place of E; its released code multiplies by E^2, which is this. For top_k = 1 without a
    selection bias it is the expert-level loss. A token has a first choice in each pool, whether or not it was taken.
    """

    def choices(self, routing: Routing) -> Int[Tensor, "T P"]:
        best, start = [], 0
        for part in routing.scores.split(self.pools, dim=-1):
            best.append(part.argmax(dim=-1) + start)
            start += part.shape[-1]
        return torch.stack(best, dim=-1)
