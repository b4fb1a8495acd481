"""Auxiliary-loss-free balancing (arXiv 2408.15664, Algorithm 1): a bias that steers the selection."""

from collections.abc import Callable

import torch
from torch import nn

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule
from moekit.tensors import Float, Int, Tensor


class BiasRule(BalanceRule):
    """After each step, an expert's bias rises by `rate` if it had less than the mean load and falls if more."""

    def __init__(self, rule: BiasBalance, config: MoEConfig) -> None:
        super().__init__()
        self.rate = rule.rate
        # A parameter without gradient, as in released checkpoints, whose published counts include it.
        self.selection_bias = nn.Parameter(torch.zeros(config.n_routed, dtype=torch.float32), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BiasRule":
        # In bfloat16 a bias of 0.5 could not move by 0.001: follow the device, keep float32.
        before = self.selection_bias.detach()
        super()._apply(fn, recurse)
        after = self.selection_bias
        if after.dtype != torch.float32:
            kept = torch.empty_like(after, dtype=torch.float32) if before.is_meta else before.to(after.device)
            self.selection_bias = nn.Parameter(kept, requires_grad=False)
        return self

    def bias(self) -> Float[Tensor, " E"]:
        return self.selection_bias

    @torch.no_grad()
    def after_step(self, load: Int[Tensor, " E"]) -> None:
        load = load.float()
        self.selection_bias += self.rate * torch.sign(load.mean() - load)
