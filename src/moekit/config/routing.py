"""The selection rules a layer can have; `moe/selection/<kind>.py` holds the maths of each.

A new rule: its dataclass here, its name in `Routing` at the end, its file. Nothing else.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.config.errors import ConfigError, check, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionConfig:
    """What every selection rule tells without torch; a rule overrides what is otherwise with it."""

    learns: ClassVar[bool] = True
    """whether there is a router that a loss can train"""
    steerable: ClassVar[bool] = True
    """whether a selection bias can steer the choice"""
    drops: ClassVar[bool] = True
    """whether an expert's capacity can turn tokens away"""
    matrices: ClassVar[int] = 3
    """matrices that one choice brings: gate, up and down of an expert"""

    @property
    def causal(self) -> bool:
        """Whether outside training a token's experts depend on no later token."""
        return True

    def pools(self, n_routed: int, top_k: int) -> tuple[tuple[int, int], ...]:
        """The pools of experts, in order, and how many a token takes of each; each pool is scored by itself."""
        return ((n_routed, top_k),)

    def n_centroids(self, n_routed: int) -> int:
        """Rows of the router's matrix."""
        return sum(size for size, _ in self.pools(n_routed, 1))

    def extra_parameters(self, n_routed: int, top_k: int, width: int) -> int:  # noqa: ARG002
        """Parameters of the rule beside the router's matrix, state included."""
        return 0

    def check(self, n_routed: int, top_k: int) -> None:
        """Raise a ConfigError where the rule does not fit these numbers; its key starts from the layer."""


def check_one_choice(rule: str, top_k: int) -> None:
    """Raise a ConfigError unless a token takes one expert."""
    check(top_k == 1, "top_k", f"{top_k}, but {rule} routing gives each token one expert", "set it to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKRouting(SelectionConfig):
    """Each token takes its `top_k` best experts. The defaults are DeepSeekMoE's (arXiv 2401.06066, eqs 9-11)."""

    kind: Literal["top_k"] = "top_k"
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
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
    group_score: Literal["max", "top2_sum", "top_sum"] = "max"
    """a group's worth: its best expert (V2), or the sum of its best two (V3) or top_k / top_k_groups (V3's paper)"""

    def __post_init__(self) -> None:
        check_not_negative(self, "epsilon")
        check_positive(self, "scale", "n_groups", "top_k_groups")
        fits = self.top_k_groups <= self.n_groups
        check(fits, "top_k_groups", f"{self.top_k_groups} exceeds n_groups = {self.n_groups}")

    def summed(self, top_k: int) -> int:
        """How many of a group's best scores make up its worth."""
        return {"max": 1, "top2_sum": 2, "top_sum": max(top_k // self.top_k_groups, 1)}[self.group_score]

    def check(self, n_routed: int, top_k: int) -> None:
        size, rest = divmod(n_routed, self.n_groups)
        if rest:
            message = f"{self.n_groups} groups do not divide n_routed = {n_routed}"
            raise ConfigError("routing.n_groups", message, f"choose a divisor of {n_routed}")
        if self.top_k_groups * size < top_k:
            message = f"{self.top_k_groups} groups of {size} hold fewer experts than top_k = {top_k}"
            raise ConfigError("routing.top_k_groups", message)
        summed = self.summed(top_k)
        if self.n_groups > 1 and size < summed:
            message = f"{self.group_score} needs at least {summed} experts in each group"
            raise ConfigError("routing.group_score", message)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisyTopKRouting(SelectionConfig):
    """Noise of a learned size on the logits in training, softmax over the chosen (arXiv 1701.06538, eqs 3-5)."""

    kind: Literal["noisy_top_k"] = "noisy_top_k"

    def extra_parameters(self, n_routed: int, top_k: int, width: int) -> int:  # noqa: ARG002
        return n_routed * width


@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchRouting(SelectionConfig):
    """The single best expert, weighted by its softmax score (arXiv 2101.03961, eqs 1-2)."""

    kind: Literal["switch"] = "switch"
    jitter: float = 0.01
    """in training the router reads x times a uniform number from 1 - jitter to 1 + jitter; experts read x"""

    def __post_init__(self) -> None:
        check(0 <= self.jitter < 1, "jitter", f"{self.jitter} must lie between 0 and 1")

    def check(self, n_routed: int, top_k: int) -> None:  # noqa: ARG002
        check_one_choice("switch", top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class GShardRouting(SelectionConfig):
    """The best two; in training the second is kept at random in proportion to its gate (arXiv 2006.16668, Alg. 1)."""

    kind: Literal["gshard"] = "gshard"

    def check(self, n_routed: int, top_k: int) -> None:  # noqa: ARG002
        check(top_k == 2, "top_k", f"{top_k}, but gshard routing gives each token two experts", "set it to 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class HashRouting(SelectionConfig):
    """A fixed table from token ids to experts (Hash layers, arXiv 2106.04426): no router, nothing to balance."""

    kind: Literal["hash"] = "hash"
    table: Literal["random", "balanced"] = "random"
    """random: drawn from the seed; balanced: filled by frequency, so that experts get equally many training tokens"""
    vocab_size: int = 0
    """number of token ids; 0 takes the model's"""
    seed: int = 0
    """of the table"""
    learns: ClassVar[bool] = False
    steerable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_not_negative(self, "vocab_size", "seed")

    def n_centroids(self, n_routed: int) -> int:  # noqa: ARG002
        return 0

    def extra_parameters(self, n_routed: int, top_k: int, width: int) -> int:  # noqa: ARG002
        return self.vocab_size * top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseRouting(SelectionConfig):
    """Equally many tokens for each expert by linear assignment, greedy outside training (BASE, arXiv 2103.16716)."""

    kind: Literal["base"] = "base"
    steerable: ClassVar[bool] = False

    def check(self, n_routed: int, top_k: int) -> None:  # noqa: ARG002
        check_one_choice("base", top_k)


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkhornRouting(SelectionConfig):
    """The best of scores balanced by Sinkhorn's iteration, greedy outside training (S-BASE, arXiv 2202.01169)."""

    kind: Literal["sinkhorn"] = "sinkhorn"
    tolerance: float = 1e-4
    """iteration ends when its factors move by less than this on average"""
    steerable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "tolerance")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertChoiceRouting(SelectionConfig):
    """Each expert takes its best tokens, `top_k` experts a token on average (arXiv 2202.09368). It sees the future."""

    kind: Literal["expert_choice"] = "expert_choice"
    scope: Literal["batch", "sequence"] = "batch"
    """tokens among which an expert chooses"""
    decode: Literal["none", "threshold"] = "none"
    """outside training: choose as in training (no generation), or take what reaches the lowest score taken there"""
    decay: float = 0.95
    """of the running average of that score, at each step"""
    steerable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(0 <= self.decay < 1, "decay", f"{self.decay} must lie between 0 and 1")

    @property
    def causal(self) -> bool:
        return self.decode == "threshold"

    def extra_parameters(self, n_routed: int, top_k: int, width: int) -> int:  # noqa: ARG002
        return n_routed


@dataclass(frozen=True, kw_only=True, slots=True)
class TopPRouting(SelectionConfig):
    """The fewest experts whose scores reach `p`, at most `top_k`: easy tokens use fewer (arXiv 2403.07652)."""

    kind: Literal["top_p"] = "top_p"
    p: float = 0.4
    """scores to reach"""
    renormalise: bool = False
    """divide the chosen weights by their sum"""

    def __post_init__(self) -> None:
        check(0 < self.p <= 1, "p", f"{self.p} must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridRouting(SelectionConfig):
    """Tokens choose their experts, but experts whose running load is too high choose their tokens."""

    kind: Literal["hybrid"] = "hybrid"
    threshold: float = 1.25
    """running load, relative to the mean, above which an expert chooses"""
    decay: float = 0.95
    """of the running averages, at each step"""
    steerable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "threshold")
        check(0 <= self.decay < 1, "decay", f"{self.decay} must lie between 0 and 1")

    def extra_parameters(self, n_routed: int, top_k: int, width: int) -> int:  # noqa: ARG002
        return 2 * n_routed


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftRouting(SelectionConfig):
    """Experts work on weighted means of a sequence's tokens, its slots (Soft MoE, arXiv 2308.00951). Not causal."""

    kind: Literal["soft"] = "soft"
    slots: int = 1
    """means that each expert works on, for each sequence"""
    steerable: ClassVar[bool] = False
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "slots")

    @property
    def causal(self) -> bool:
        return False

    def pools(self, n_routed: int, top_k: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        return ((n_routed, n_routed),)

    def n_centroids(self, n_routed: int) -> int:
        return n_routed * self.slots

    def extra_parameters(self, n_routed: int, top_k: int, width: int) -> int:  # noqa: ARG002
        return 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoPoolRouting(SelectionConfig):
    """`top_k_common` of the first `n_common` experts and the rest of `top_k` of the others, each pool by itself."""

    kind: Literal["two_pool"] = "two_pool"
    n_common: int = 2
    """experts in the first pool"""
    top_k_common: int = 1
    """how many of them a token takes"""
    renormalise: bool = False
    """divide a pool's chosen weights by their sum"""

    def __post_init__(self) -> None:
        check_positive(self, "n_common", "top_k_common")
        fits = self.top_k_common <= self.n_common
        check(fits, "top_k_common", f"{self.top_k_common} exceeds n_common = {self.n_common}")

    def pools(self, n_routed: int, top_k: int) -> tuple[tuple[int, int], ...]:
        return ((self.n_common, self.top_k_common), (n_routed - self.n_common, top_k - self.top_k_common))

    def check(self, n_routed: int, top_k: int) -> None:
        (_, _), (size, chosen) = self.pools(n_routed, top_k)
        message = f"{self.n_common} leaves no expert of n_routed = {n_routed} to the other pool"
        check(size > 0, "routing.n_common", message)
        check(0 < chosen <= size, "top_k", f"{top_k} takes {chosen} of the {size} experts in the second pool")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRouting(SelectionConfig):
    """Each task has experts of its own, and all share the first `n_common`; no token reaches another task's experts."""

    kind: Literal["task"] = "task"
    n_tasks: int = 1
    """tasks; in training the domains of the data, in their order"""
    n_common: int = 1
    """experts that every task may use; the others are divided evenly, in order"""
    renormalise: bool = True
    """divide the chosen weights by their sum"""

    def __post_init__(self) -> None:
        check_positive(self, "n_tasks")
        check_not_negative(self, "n_common")

    def owned(self, n_routed: int) -> int:
        """Experts of each task alone."""
        return (n_routed - self.n_common) // self.n_tasks

    def check(self, n_routed: int, top_k: int) -> None:
        own = n_routed - self.n_common
        fits = own >= 0 and own % self.n_tasks == 0
        message = f"the {own} experts beside n_common = {self.n_common} do not divide among {self.n_tasks} tasks"
        check(fits, "routing.n_tasks", message)
        reach = self.n_common + self.owned(n_routed)
        check(top_k <= reach, "top_k", f"{top_k} experts per token, but a task reaches {reach}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionRouting(SelectionConfig):
    """Gate, up and down matrices chosen separately, `top_k` of each: three routings, as many parameters as experts."""

    kind: Literal["projection"] = "projection"
    renormalise: bool = True
    """divide the chosen weights of each projection by their sum"""
    matrices: ClassVar[int] = 1

    def pools(self, n_routed: int, top_k: int) -> tuple[tuple[int, int], ...]:
        return ((n_routed, top_k),) * 3


@dataclass(frozen=True, kw_only=True, slots=True)
class NullRouting(SelectionConfig):
    """As softmax top-k, with `n_null` more experts that compute nothing: easy tokens may take these."""

    kind: Literal["null"] = "null"
    n_null: int = 1
    """experts that compute nothing"""
    renormalise: bool = False
    """divide the weights of the other chosen experts by their sum"""

    def __post_init__(self) -> None:
        check_positive(self, "n_null")

    def n_centroids(self, n_routed: int) -> int:
        return n_routed + self.n_null


Routing = (
    TopKRouting
    | NoisyTopKRouting
    | SwitchRouting
    | GShardRouting
    | HashRouting
    | BaseRouting
    | SinkhornRouting
    | ExpertChoiceRouting
    | TopPRouting
    | HybridRouting
    | SoftRouting
    | TwoPoolRouting
    | TaskRouting
    | ProjectionRouting
    | NullRouting
)
"""All selection rules."""
