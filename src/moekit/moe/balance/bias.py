"""Auxiliary-loss-free balancing (arXiv 2408.15664, Algorithm 1): a bias that steers the selection."""

import torch

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.moe.balance.rule import BalanceRule
from moekit.moe.state import state
from moekit.tensors import Float, Int, Tensor


class Rule(BalanceRule):
    """After each step, an expert's bias rises by `rate` if it had less than the mean load and falls if more.

    The mean is that of the expert's pool. The paper's variants (section 4.3): `proportional` moves a bias by the
    violation itself, here relative to the mean load, so that the rate does not depend on the size of a batch (the
    paper's u is rate / mean load); `multiplicative` chooses by the scores times 1 + bias. `centred` subtracts a pool's
    mean bias, as Moonlight does: the choice is the same, the numbers stay small.
    """

    def __init__(self, rule: BiasBalance, config: MoEConfig) -> None:
        super().__init__(rule, config)
        self.selection_bias = state(torch.zeros(config.n_choices))
        # Only a rule that ends counts: released checkpoints hold the bias and nothing else.
        self.steps = state(torch.zeros(1)) if rule.until_step else None

    def bias(self) -> Float[Tensor, " E"] | None:
        return None if self.rule.update == "multiplicative" else self.selection_bias

    def factor(self) -> Float[Tensor, " E"] | None:
        return 1 + self.selection_bias if self.rule.update == "multiplicative" else None

    @torch.no_grad()
    def after_step(self, load: Int[Tensor, " E"]) -> None:
        if self.steps is not None:
            if self.steps.item() >= self.rule.until_step:
                return
            self.steps += 1
        for bias, part in zip(self.selection_bias.split(self.pools), load.float().split(self.pools), strict=True):
            bias.add_(self._direction(part), alpha=self.rule.rate)
            if self.rule.centred:
                bias.sub_(bias.mean())

    def _direction(self, load: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
        """Up where the load is below the mean; nowhere where there is none."""
        mean = load.mean()
        if self.rule.update == "proportional":
            return (mean - load) / torch.where(mean > 0, mean, 1)
        return torch.sign(mean - load)
