"""The mixture-of-experts layer: how many experts, how a token chooses among them, what keeps them balanced."""

from dataclasses import dataclass, replace

from moekit.config.balance import BalanceRule
from moekit.config.capacity import Capacity, DeviceCapacity
from moekit.config.errors import ConfigError, check, check_not_negative, check_positive
from moekit.config.routing import NoisyTopKRouting, Routing, TopKRouting


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
    shared_average: bool = False
    """(shared block + top_k x routed sum) / (top_k + 1) in place of their sum (OLMo-core)"""
    expert_dropout: float = 0.0
    """in training, share of an expert's inner numbers set to zero (arXiv 2101.03961, section 2.4)"""
    routing: Routing = TopKRouting()  # noqa: RUF009 - frozen
    """how a token chooses"""
    balance: tuple[BalanceRule, ...] = ()
    """what keeps the load even, each rule at most once"""
    capacity: Capacity | None = None
    """how many tokens an expert serves at most; none: all that come"""

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
        check(self.n_shared > 0 or not self.shared_average, "shared_average", "there is no shared expert")
        check(0 <= self.expert_dropout < 1, "expert_dropout", f"{self.expert_dropout} must lie between 0 and 1")
        self.routing.check(self.n_routed, self.top_k)
        self._check_balance()
        limited = self.capacity is not None and not self.routing.drops
        check(not limited, "capacity", f"{self.routing.kind} routing sends no tokens that an expert could turn away")
        if isinstance(self.capacity, DeviceCapacity):
            self._check_devices("capacity.n_devices", self.capacity.n_devices)

    def _check_balance(self) -> None:
        kinds = [rule.kind for rule in self.balance]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        check(not twice, "balance", f"{', '.join(twice)} is given twice")
        # Rules do not depend on their order; equal sets of rules should make equal configurations.
        object.__setattr__(self, "balance", tuple(sorted(self.balance, key=lambda rule: rule.kind)))
        for rule in self.balance:
            if (n_devices := getattr(rule, "n_devices", None)) is not None:
                self._check_devices(f"balance.{rule.kind}.n_devices", n_devices)
            kind, key = self.routing.kind, f"balance.{rule.kind}"
            hint = f"set {key} to none"
            check(self.routing.learns, key, f"{kind} routing has no router to balance", hint)
            steers = self.routing.steerable or not rule.steers
            check(steers, key, f"a bias cannot steer {kind} routing, which balances by itself", hint)
            fits = not rule.needs_kind or kind in rule.needs_kind
            check(fits, key, f"needs {' or '.join(rule.needs_kind)} routing, not {kind}", hint)

    def _check_devices(self, key: str, n_devices: int) -> None:
        if self.n_routed % n_devices:
            raise ConfigError(key, f"{self.n_routed} experts do not divide among {n_devices} devices")

    @property
    def shared_width(self) -> int:
        """Inner width of the fused shared block."""
        return self.n_shared * (self.shared_expert_width or self.expert_width)

    @property
    def active_experts(self) -> int:
        """Experts whose matrices a token meets; of `projection` routing as many matrices as so many experts have."""
        return sum(chosen for _, chosen in self.pools) * self.routing.matrices // 3

    @property
    def top_k_routing(self) -> TopKRouting:
        """The routing of models that other programs know. Raises ConfigError where it is another."""
        if not isinstance(self.routing, TopKRouting):
            raise ConfigError("moe.routing.kind", f"{self.routing.kind} routing is known to moekit alone")
        return self.routing

    @property
    def pools(self) -> tuple[tuple[int, int], ...]:
        """The pools of choices, in order: (how many there are, how many a token takes)."""
        return self.routing.pools(self.n_routed, self.top_k)

    @property
    def n_choices(self) -> int:
        """What the router scores: the experts, or the gate, up and down matrices of `projection` routing."""
        return sum(size for size, _ in self.pools)


def check_router_learns(config: MoEConfig) -> None:
    """Raise a ConfigError where the output tells the router nothing: one expert per token, weighed by 1 always.

    Such a layer computes what it was made to compute, but training could not improve its choice.
    """
    routing = config.routing
    if not any(chosen == 1 < size for size, chosen in config.pools):
        return
    choice = "top_k = 1" if len(config.pools) == 1 else f"one choice of a pool ({routing.kind} routing)"
    message = f"with {choice} the weight is always 1 and the router gets no gradient from the output"
    renormalised = getattr(routing, "renormalise", False)
    check(not renormalised, "routing.renormalise", message, "set it to false, or raise top_k")
    late = isinstance(routing, TopKRouting) and routing.order == "top_k_then_score" and routing.score == "softmax"
    check(not late, "routing.order", message, "choose score_then_top_k, or raise top_k")
    check(not isinstance(routing, NoisyTopKRouting), "top_k", message, "raise it to 2")


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
