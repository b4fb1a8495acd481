"""Routing is a value: which experts serve which token, with which weight. All else consumes it."""

from typing import NamedTuple

from moekit.tensors import Bool, Float, Int, Tensor


class Drawn(NamedTuple):
    """The normal distribution that noisy logits were drawn from, and these; outside training they are its mean."""

    mean: Float[Tensor, "T E"]
    deviation: Float[Tensor, "T E"]
    logits: Float[Tensor, "T E"]


class Routing(NamedTuple):
    """A router's decision for T tokens.

    `experts` holds the assignment before any token is dropped; -1 marks an empty place, so that a token may use fewer
    than K experts. `served` says which expert serves each place once capacities are kept, -1 where none does (None: as
    assigned); `weights` belong to these, `weights_before` to the assignment (None: the same). `mask` tells which tokens
    are real (None: all). What a router scores are its experts, or with several pools of choices those of the first,
    then of the next.
    """

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    scores: Float[Tensor, "T E"]
    logits: Float[Tensor, "T L"]
    n_sequences: int = 1
    served: Int[Tensor, "T K"] | None = None
    mask: Bool[Tensor, " T"] | None = None
    drawn: Drawn | None = None
    weights_before: Float[Tensor, "T K"] | None = None

    @property
    def assigned_weights(self) -> Float[Tensor, "T K"]:
        """The weights of `experts`, before any token is dropped."""
        return self.weights if self.weights_before is None else self.weights_before

    @property
    def n_experts(self) -> int:
        """Number of routed experts, E."""
        return self.scores.shape[-1]
