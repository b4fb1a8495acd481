"""The mixture-of-experts layer: how many experts, how a token chooses among them, what keeps them balanced."""

from dataclasses import dataclass, replace
from typing import Literal

from moekit.config.balance import BalanceRule, CommunicationLoss, DeviceLoss
from moekit.config.errors import ConfigError, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKRouting:
    """Each token takes its `top_k` best experts. The defaults are DeepSeekMoE's (arXiv 2401.06066, eqs 9-11)."""

    kind: Literal["top_k"] = "top_k"
    score: Literal["softmax", "sigmoid"] = "softmax"
    """how a logit becomes a score"""
    order: Literal["score_then_top_k", "top_k_then_score"] = "score_then_top_k"
    """score all experts and choose, or choose and score the chosen (Mixtral)"""
    renormalise: bool = False
    """divide the chosen weights by their sum"""
    epsilon: float = 0.0
    """added to that sum; DeepSeek adds 1e-20"""
    scale: float = 1.0
    """factor of the weights (routed_scaling_factor)"""
    n_groups: int = 1
    """groups of experts, each on one node or device"""
    top_k_groups: int = 1
    """groups a token may choose from"""
    group_score: Literal["max", "top2_sum"] = "max"
    """a group's worth: its best expert (V2) or the sum of its two best (V3)"""

    def __post_init__(self) -> None:
        check_not_negative(self, "epsilon")
        check_positive(self, "scale", "n_groups", "top_k_groups")
        fits = self.top_k_groups <= self.n_groups
        check(fits, "top_k_groups", f"{self.top_k_groups} exceeds n_groups = {self.n_groups}")


Routing = TopKRouting


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """A feed-forward block of `n_routed` small experts of which each token uses `top_k`, and `n_shared` always on."""

    width: int = 0
    """width of the tokens; 0 takes the model's"""
    expert_width: int = 64
    """inner width of one expert"""
    n_routed: int = 16
    """experts the router chooses from"""
    n_shared: int = 1
    """experts that every token uses, fused into one block"""
    shared_expert_width: int = 0
    """inner width of one shared expert; 0 takes expert_width"""
    top_k: int = 4
    """routed experts per token"""
    shared_gate: bool = False
    """scale the shared block by a sigmoid gate (Qwen2-MoE)"""
    routing: Routing = TopKRouting()
    """how a token chooses"""
    balance: tuple[BalanceRule, ...] = ()
    """what keeps the load even, each rule at most once"""

    def __post_init__(self) -> None:
        check_not_negative(self, "width", "n_shared", "shared_expert_width")
        check_positive(self, "expert_width", "n_routed", "top_k")
        check(
            self.top_k <= self.n_routed,
            "top_k",
            f"{self.top_k} experts per token, but n_routed = {self.n_routed}",
            f"choose a top_k of at most {self.n_routed}",
        )
        check(self.n_shared > 0 or not self.shared_gate, "shared_gate", "there is no shared expert to gate")
        self._check_groups()
        kinds = [rule.kind for rule in self.balance]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        check(not twice, "balance", f"{', '.join(twice)} is given twice")
        # Rules do not depend on their order; equal sets of rules should make equal configurations.
        object.__setattr__(self, "balance", tuple(sorted(self.balance, key=lambda rule: rule.kind)))
        for rule in self.balance:
            if isinstance(rule, DeviceLoss | CommunicationLoss) and self.n_routed % rule.n_devices:
                message = f"{self.n_routed} experts do not divide among {rule.n_devices} devices"
                raise ConfigError(f"balance.{rule.kind}.n_devices", message)

    def _check_groups(self) -> None:
        routing = self.routing
        size, rest = divmod(self.n_routed, routing.n_groups)
        if rest:
            message = f"{routing.n_groups} groups do not divide n_routed = {self.n_routed}"
            raise ConfigError("routing.n_groups", message, f"choose a divisor of {self.n_routed}")
        if routing.top_k_groups * size < self.top_k:
            message = f"{routing.top_k_groups} groups of {size} hold fewer experts than top_k = {self.top_k}"
            raise ConfigError("routing.top_k_groups", message)
        if routing.n_groups > 1 and routing.group_score == "top2_sum" and size < 2:
            raise ConfigError("routing.group_score", "top2_sum needs at least 2 experts in each group")

    @property
    def shared_width(self) -> int:
        """Inner width of the fused shared block."""
        return self.n_shared * (self.shared_expert_width or self.expert_width)


def check_router_learns(config: MoEConfig) -> None:
    """Raise a ConfigError where the output tells the router nothing: one expert per token, weighed by 1 always.

    Such a layer computes what it was made to compute, but training could not improve its choice.
    """
    routing = config.routing
    if config.top_k > 1 or config.n_routed == 1:
        return
    message = "with top_k = 1 the weight is always 1 and the router gets no gradient from the output"
    check(not routing.renormalise, "routing.renormalise", message, "set it to false, or raise top_k")
    certain = routing.order == "top_k_then_score" and routing.score == "softmax"
    check(not certain, "routing.order", message, "choose score_then_top_k, or raise top_k")


def split(config: MoEConfig, m: int) -> MoEConfig:
    """Split every expert into `m` finer ones: m N experts of 1/m the width, top m K (arXiv 2401.06066, section 3.1).

    The experts keep their number of parameters and their FLOPs per token; a token chooses among far more combinations.
    Raises ConfigError where the width does not divide.
    """
    check(m > 0, "m", f"{m} must be above 0")
    for key in ("expert_width", "shared_expert_width"):
        width = getattr(config, key)
        check(width % m == 0, key, f"{width} does not divide by {m}")
    return replace(
        config,
        expert_width=config.expert_width // m,
        shared_expert_width=config.shared_expert_width // m,
        n_routed=config.n_routed * m,
        n_shared=config.n_shared * m,
        top_k=config.top_k * m,
    )
