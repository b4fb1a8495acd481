"""What a capacity is: which places of a routing are served where there is room for so many only."""

from typing import Any

import torch

from moekit.config.moe import MoEConfig
from moekit.moe.routing import Routing
from moekit.moe.state import Float32State
from moekit.tensors import Float, Int, Tensor


class CapacityLimit(Float32State):
    """Turns away what does not fit; what was assigned stays as it was, for statistics and losses.

    Weights are not divided by their sum after places were dropped: a token then gets less from the routed experts, as
    in Switch, GShard, V-MoE and Megatron (DeepSpeed renormalises). Padding takes no room, and is served as without
    capacities. Chance takes part in training alone.
    """

    def __init__(self, capacity: Any, config: MoEConfig) -> None:
        super().__init__()
        self.capacity, self.config = capacity, config
        self.in_evaluation: bool = capacity.in_evaluation

    def limit(self, routing: Routing, ranking: Float[Tensor, "T E"], generator: torch.Generator | None) -> Routing:
        """The routing with `served`, and with the weights of experts that serve in another's place.

        `ranking` orders a token's experts, -inf for those it may not use.
        """
        raise NotImplementedError

    def after_step(self, load: Int[Tensor, " E"], tokens: Int[Tensor, ""]) -> None:  # noqa: ARG002
        """Follow the load of the optimizer step that ended, counted before dropping, and its number of real tokens."""
        return None

    def places(self, tokens: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Places that so many tokens ask for where each takes its full number of experts, in all pools together."""
        return tokens * sum(chosen for _, chosen in self.config.pools)


def room_for(factor: Float[Tensor, "*#shape"] | float, share: Float[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """ceil(factor x share), so at least 1 for any share. 1.1 times 10 is 11, though as floats it is a little more."""
    return (factor * share.double() * (1 - 1e-6)).ceil().long()
