"""Auxiliary-loss-free balancing (arXiv 2408.15664, Algorithm 1): a bias that steers the selection."""

import torch

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule
from moekit.moe.state import state
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """After each step, an expert's bias rises by `rate` if it had less than the mean load and falls if more."""

    def __init__(self, rule: BiasBalance, config: MoEConfig) -> None:
        super().__init__()
        self.rate = rule.rate
        self.selection_bias = state(torch.zeros(config.n_choices))

    def bias(self) -> Float[Tensor, " E"]:
        return self.selection_bias

    @torch.no_grad()
    def after_step(self, load: Int[Tensor, " E"]) -> None:
        load = load.float()
        self.selection_bias += self.rate * torch.sign(load.mean() - load)
