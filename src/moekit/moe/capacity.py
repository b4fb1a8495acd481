"""Which places of a routing are served where experts or devices have room for so many tokens only."""

from typing import Any

import torch

from moekit.config.moe import MoEConfig
from moekit.moe.routing import Routing
from moekit.moe.state import Float32State
from moekit.tensors import Float, Int, Tensor


class CapacityLimit(Float32State):
    """Turns away what does not fit; what was assigned stays as it was, for statistics and losses."""

    def __init__(self, capacity: Any, config: MoEConfig) -> None:
        super().__init__()
        self.capacity, self.config = capacity, config
        self.in_evaluation: bool = capacity.in_evaluation

    def limit(self, routing: Routing, ranking: Float[Tensor, "T E"], generator: torch.Generator | None) -> Routing:
        """The routing with `served`, and with the weights of experts that serve in another's place."""
        raise NotImplementedError

    def after_step(self, load: Int[Tensor, " E"]) -> None:
        """Follow the load of the optimizer step that ended."""


def build_capacity(config: MoEConfig) -> CapacityLimit | None:
    """The limit of a layer; None where every token is served."""
    return None if config.capacity is None else CapacityLimit(config.capacity, config)
