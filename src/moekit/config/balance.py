"""The balancing rules a layer can carry; `moe/balance/<kind>.py` holds the maths of each.

A new rule: its dataclass here, its name in `BalanceRule` at the end, its file. Nothing else.

A loss that balances equals its coefficient at perfect balance. Hugging Face's `load_balancing_loss_func` is top_k
there, so that its coefficient c is top_k x c here. Losses of a squared coefficient of variation CV are coefficient x
(1 + CV^2): the constant has no gradient, and puts them on the scale of the others.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.config.errors import check, check_not_negative, check_positive

Scope = Literal["sequence", "micro_batch", "batch"]
"""Over which tokens a load is counted: each sequence, one micro-batch, or the whole optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """What every rule tells without torch; a rule overrides what is otherwise with it."""

    balances: ClassVar[bool] = True
    """whether it works towards an even load; a loss that does equals its coefficient there"""
    steers: ClassVar[bool] = False
    """whether it moves the choice itself"""
    needs_kind: ClassVar[tuple[str, ...]] = ()
    """the kinds of routing that it is made for; empty: all"""

    def __post_init__(self) -> None:
        if hasattr(self, "coefficient"):
            check_not_negative(self, "coefficient")


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasBalance(BalanceConfig):
    """Auxiliary-loss-free balancing: a bias that steers the selection (arXiv 2408.15664, Algorithm 1)."""

    kind: Literal["bias"] = "bias"
    rate: float = 0.001
    """how far the bias of an expert moves at each step; 0 keeps it"""
    layer_rates: tuple[float, ...] = ()
    """the rate of each mixture-of-experts layer, in order, that of the prediction module last; empty: `rate` in all"""
    update: Literal["sign", "proportional", "multiplicative"] = "sign"
    """sign: by the rate, whatever the violation; proportional: by rate x (mean load - load) / mean load;
    multiplicative: as sign, but scores are multiplied by 1 + bias"""
    centred: bool = False
    """subtract the mean of all biases after each update, which changes no choice"""
    until_step: int = 0
    """the rate is 0 from this step on; 0: never"""
    steers: ClassVar[bool] = True

    @property
    def released(self) -> bool:
        """Whether released checkpoints can hold it: a bias to add, and no count of steps."""
        return self.update != "multiplicative" and self.until_step == 0

    def __post_init__(self) -> None:
        check_not_negative(self, "rate", "until_step")
        check(all(rate >= 0 for rate in self.layer_rates), "layer_rates", "must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoss(BalanceConfig):
    """Expert-level balance loss (arXiv 2401.06066, eqs 12-14)."""

    kind: Literal["expert_loss"] = "expert_loss"
    coefficient: float = 0.001
    """the loss at perfect balance"""
    scope: Scope = "sequence"
    """tokens over which the load is counted"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLoss(BalanceConfig):
    """Device-level balance loss (arXiv 2401.06066, eqs 15-17)."""

    kind: Literal["device_loss"] = "device_loss"
    coefficient: float = 0.05
    """the loss at perfect balance"""
    scope: Scope = "sequence"
    """tokens over which the load is counted"""
    n_devices: int = 1
    """devices that share the routed experts, in order and evenly"""

    def __post_init__(self) -> None:
        check_not_negative(self, "coefficient")
        check_positive(self, "n_devices")


@dataclass(frozen=True, kw_only=True, slots=True)
class CommunicationLoss(BalanceConfig):
    """Communication balance loss (arXiv 2405.04434, eqs 29-31)."""

    kind: Literal["communication_loss"] = "communication_loss"
    coefficient: float = 0.02
    """the loss at perfect balance"""
    scope: Scope = "sequence"
    """tokens over which the load is counted"""
    n_devices: int = 1
    """devices that share the routed experts, in order and evenly"""
    max_devices: int = 1
    """devices a token may reach (M in the paper)"""

    def __post_init__(self) -> None:
        check_not_negative(self, "coefficient")
        check_positive(self, "n_devices", "max_devices")
        within = self.max_devices <= self.n_devices
        check(within, "max_devices", f"{self.max_devices} exceeds n_devices = {self.n_devices}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLoss(BalanceConfig):
    """Complementary sequence-wise balance loss (arXiv 2412.19437, eqs 17-20)."""

    kind: Literal["sequence_loss"] = "sequence_loss"
    coefficient: float = 0.0001
    """the loss at perfect balance"""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterZLoss(BalanceConfig):
    """Router z-loss: keeps the router's logits small (arXiv 2202.08906, eq 5)."""

    kind: Literal["z_loss"] = "z_loss"
    coefficient: float = 0.001
    """factor of the mean squared log-sum-exp of the logits"""
    balances: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstChoiceLoss(BalanceConfig):
    """The balance loss of Switch (arXiv 2101.03961, eqs 4-6) and GShard (2006.16668, Alg. 1): first choices count."""

    kind: Literal["first_choice_loss"] = "first_choice_loss"
    coefficient: float = 0.01
    """the loss at perfect balance"""
    scope: Scope = "batch"
    """tokens over which the load is counted"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceLoss(BalanceConfig):
    """Equal sums of the chosen experts' weights (arXiv 1701.06538, eqs 6-7)."""

    kind: Literal["importance_loss"] = "importance_loss"
    coefficient: float = 0.1
    """the loss at perfect balance"""
    scope: Scope = "batch"
    """tokens over which weights are summed"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadLoss(BalanceConfig):
    """Equal smooth loads of noisy top-k routing (arXiv 1701.06538, eqs 8-11)."""

    kind: Literal["load_loss"] = "load_loss"
    coefficient: float = 0.1
    """the loss at perfect balance"""
    scope: Scope = "batch"
    """tokens over which the load is counted"""
    needs_kind: ClassVar[tuple[str, ...]] = ("noisy_top_k",)


@dataclass(frozen=True, kw_only=True, slots=True)
class VarianceLoss(BalanceConfig):
    """The variance of the load, with the mean probability of an expert in place of its count."""

    kind: Literal["variance_loss"] = "variance_loss"
    coefficient: float = 0.01
    """the loss at perfect balance"""
    scope: Scope = "batch"
    """tokens over which probabilities are averaged"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyLoss(BalanceConfig):
    """The entropy of a token's scores: sharp scores let top-p routing stop early (arXiv 2403.07652)."""

    kind: Literal["entropy_loss"] = "entropy_loss"
    coefficient: float = 0.0001
    """factor of the mean entropy, in nats"""
    balances: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonMassLoss(BalanceConfig):
    """Keeps common experts from doing what those of the tasks are for: their share of a token's gate mass."""

    kind: Literal["common_mass_loss"] = "common_mass_loss"
    coefficient: float = 0.01
    """factor of the mean share"""
    balances: ClassVar[bool] = False
    needs_kind: ClassVar[tuple[str, ...]] = ("task", "two_pool")


BalanceRule = (
    BiasBalance
    | ExpertLoss
    | DeviceLoss
    | CommunicationLoss
    | SequenceLoss
    | RouterZLoss
    | FirstChoiceLoss
    | ImportanceLoss
    | LoadLoss
    | VarianceLoss
    | EntropyLoss
    | CommonMassLoss
)
"""All balancing rules."""
