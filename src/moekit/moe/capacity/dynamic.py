"""As `expert`, where the room of each expert follows its load."""

import torch

from moekit.config.capacity import DynamicCapacity
from moekit.config.moe import MoEConfig
from moekit.moe.capacity import expert
from moekit.moe.state import state
from moekit.tensors import Float, Int, Tensor


class Limit(expert.Limit):
    """A factor for each expert, and the running average of its use, load before dropping / room; -1: none so far.

    After each step, use = decay use + (1 - decay) now (the first is taken whole), and the factor is multiplied by
    `shrink` where use < low, by `grow` where use > high, within `smallest` and `largest`. The room now is that of the
    step's tokens in one forward pass; that of several micro-batches is more by what each of them rounds up.
    """

    def __init__(self, capacity: DynamicCapacity, config: MoEConfig) -> None:
        super().__init__(capacity, config)
        self.factors = state(torch.full((config.n_choices,), capacity.factor))
        self.use = state(torch.full((config.n_choices,), -1.0))

    def factor(self) -> Float[Tensor, " E"]:
        return self.factors

    @torch.no_grad()
    def after_step(self, load: Int[Tensor, " E"], tokens: Int[Tensor, ""]) -> None:
        if tokens == 0:
            return
        c: DynamicCapacity = self.capacity
        now = load / self.room(tokens.unsqueeze(0))[0]
        use = torch.where(self.use < 0, now, c.decay * self.use + (1 - c.decay) * now)
        step = torch.ones_like(use).masked_fill_(use < c.low, c.shrink).masked_fill_(use > c.high, c.grow)
        self.use.copy_(use)
        self.factors.mul_(step).clamp_(c.smallest, c.largest)
