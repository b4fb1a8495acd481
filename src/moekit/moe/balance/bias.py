"""Auxiliary-loss-free balancing (arXiv 2408.15664, Algorithm 1): a bias that steers the selection."""

from collections.abc import Callable
from typing import Self

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
        self.correction = nn.Buffer(torch.zeros(config.n_routed, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # In bfloat16 a bias of 0.5 could not move by 0.001: follow the device, keep float32.
        before = self.correction
        super()._apply(fn, recurse)
        after = self.correction
        if after.dtype != torch.float32:
            self.correction = torch.empty_like(after, dtype=torch.float32) if before.is_meta else before.to(after.device)
        return self

    def bias(self) -> Float[Tensor, " E"]:
        return self.correction

    @torch.no_grad()
    def after_step(self, load: Int[Tensor, " E"]) -> None:
        load = load.float()
        self.correction += self.rate * torch.sign(load.mean() - load)
