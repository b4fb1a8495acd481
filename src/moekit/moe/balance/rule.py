"""What a balancing rule is: a bias for the selection, a term of the loss, a state that follows the load."""

from typing import Any, NamedTuple

from moekit.config.moe import MoEConfig
from moekit.moe.routing import Routing
from moekit.moe.state import Float32State
from moekit.tensors import Float, Int, Tensor


class StepCount(NamedTuple):
    """What a rule counted over all micro-batches of an optimizer step, and the real tokens it counted over."""

    counts: Int[Tensor, " X"] | Float[Tensor, " X"]
    tokens: int


class BalanceRule(Float32State):
    """Hooks that do nothing; a rule overrides those it needs.

    Losses see assignments before dropping and count real tokens only; those that balance equal their coefficient at
    perfect balance. They are means over sequences or tokens: the loss of a micro-batch enters the step's by its share
    of the tokens. `pools` are the sizes of the pools of choices; each is balanced by itself, and they count alike.
    """

    counts_step = False
    """Whether `loss` needs what `count` finds in all micro-batches of the step."""

    def __init__(self, rule: Any, config: MoEConfig) -> None:
        super().__init__()
        self.rule, self.config = rule, config
        self.pools = [size for size, _ in config.pools]
        self.counts_step = getattr(rule, "scope", None) == "batch"

    def bias(self) -> Float[Tensor, " E"] | None:
        """What is added to the scores when experts are chosen, never to the weights."""
        return None

    def factor(self) -> Float[Tensor, " E"] | None:
        """What the scores are multiplied with when experts are chosen, before `bias` is added."""
        return None

    def count(self, routing: Routing) -> Int[Tensor, " X"] | Float[Tensor, " X"]:
        """What `loss` must know of the whole step where the rule `counts_step`, to be summed over micro-batches."""
        raise NotImplementedError

    def loss(self, routing: Routing, step: StepCount | None = None) -> Float[Tensor, ""] | None:  # noqa: ARG002
        """The term of the objective. Without `step`, the routing given is taken for the whole step."""
        return None

    def after_step(self, load: Int[Tensor, " E"]) -> None:  # noqa: ARG002
        """Follow the load of the optimizer step that ended."""
        return None
