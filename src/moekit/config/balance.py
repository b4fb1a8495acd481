"""The balancing rules a layer can carry; `moe/balance/` holds the maths of each."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.config.errors import check, check_not_negative, check_positive

Scope = Literal["sequence", "micro_batch", "batch"]
"""Over which tokens a load is counted: each sequence, one micro-batch, or the whole optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BiasBalance:
    """Auxiliary-loss-free balancing: a bias that steers the selection (arXiv 2408.15664, Algorithm 1)."""

    kind: Literal["bias"] = "bias"
    rate: float = 0.001
    """how far the bias of an expert moves at each step; 0 keeps it"""
    layer_rates: tuple[float, ...] = ()
    """the rate of each mixture-of-experts layer, in order, that of the prediction module last; empty: `rate` in all"""
    steers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative(self, "rate")
        check(all(rate >= 0 for rate in self.layer_rates), "layer_rates", "must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoss:
    """Expert-level balance loss (arXiv 2401.06066, eqs 12-14)."""

    kind: Literal["expert_loss"] = "expert_loss"
    coefficient: float = 0.001
    """the loss at perfect balance"""
    scope: Scope = "sequence"
    """tokens over which the load is counted"""

    def __post_init__(self) -> None:
        check_not_negative(self, "coefficient")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLoss:
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
class CommunicationLoss:
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
class SequenceLoss:
    """Complementary sequence-wise balance loss (arXiv 2412.19437, eqs 17-20)."""

    kind: Literal["sequence_loss"] = "sequence_loss"
    coefficient: float = 0.0001
    """the loss at perfect balance"""

    def __post_init__(self) -> None:
        check_not_negative(self, "coefficient")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterZLoss:
    """Router z-loss: keeps the router's logits small (arXiv 2202.08906, eq 5)."""

    kind: Literal["z_loss"] = "z_loss"
    coefficient: float = 0.001
    """factor of the mean squared log-sum-exp of the logits"""

    def __post_init__(self) -> None:
        check_not_negative(self, "coefficient")


BalanceRule = BiasBalance | ExpertLoss | DeviceLoss | CommunicationLoss | SequenceLoss | RouterZLoss
