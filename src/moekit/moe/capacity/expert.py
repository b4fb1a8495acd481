"""Each expert serves so many places: Switch (arXiv 2101.03961, eq 3), GShard (2006.16668), V-MoE (2106.05974)."""

import torch

from moekit.config.capacity import Drop, DynamicCapacity, ExpertCapacity
from moekit.config.moe import MoEConfig
from moekit.moe.capacity.limit import CapacityLimit, room_for
from moekit.moe.capacity.next_best import moved_weights, to_next_best
from moekit.moe.capacity.queue import queue, within_room
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Limit(CapacityLimit):
    """An expert has room for ceil(factor x K x T / E) places, at least 1, of the batch's T real tokens or a sequence's.

    With several pools of choices, K is the sum of what a token takes of each and E that of their sizes.
    """

    def __init__(self, capacity: ExpertCapacity | DynamicCapacity, config: MoEConfig) -> None:
        super().__init__(capacity, config)
        self.by_sequence = isinstance(capacity, ExpertCapacity) and capacity.scope == "sequence"

    def factor(self) -> Float[Tensor, " E"] | float:
        """Room relative to an equal share, of each expert or of all."""
        return self.capacity.factor

    @torch.no_grad()
    def room(self, tokens: Int[Tensor, " G"]) -> Int[Tensor, "G E"]:
        """Places that each expert serves in groups of so many real tokens."""
        n_choices = self.config.n_choices
        share = self.places(tokens).unsqueeze(-1).double() / n_choices
        return room_for(self.factor(), share).expand(len(tokens), n_choices)

    def limit(self, routing: Routing, ranking: Float[Tensor, "T E"], generator: torch.Generator | None) -> Routing:
        served = self._served(routing, ranking, generator)
        weights = moved_weights(routing, served) if self.capacity.dropped == "next_best" else routing.weights
        weights = weights.masked_fill(served < 0, 0)
        return routing._replace(served=served, weights=weights, weights_before=routing.weights)

    @torch.no_grad()
    def _served(
        self, routing: Routing, ranking: Float[Tensor, "T E"], generator: torch.Generator | None
    ) -> Int[Tensor, "T K"]:
        drop: Drop = self.capacity.drop
        # Outside training the same tokens always meet the same fate.
        line = queue(routing, drop if self.training or drop != "random" else "position", generator)
        group, real = self._groups(routing)
        room = self.room(real)
        bins = group[line.token] * room.shape[-1] + line.of(routing.experts)
        kept = within_room(bins, room.flatten())
        served = line.at(~kept).emptied(routing.experts)
        if self.capacity.dropped == "next_best":
            left = room - torch.bincount(bins[kept], minlength=room.numel()).view_as(room)
            return to_next_best(served, routing, ranking, line.at(~kept), group, left, self.config.pools)
        return served

    def _groups(self, routing: Routing) -> tuple[Int[Tensor, " T"], Int[Tensor, " G"]]:
        """The group of each token, its sequence or 0, and the real tokens of each group."""
        n_tokens, device = len(routing.experts), routing.experts.device
        n_groups = routing.n_sequences if self.by_sequence else 1
        group = torch.arange(n_tokens, device=device) // max(n_tokens // n_groups, 1)
        real = torch.ones(n_tokens, dtype=torch.long, device=device) if routing.mask is None else routing.mask.long()
        return group, torch.zeros(n_groups, dtype=torch.long, device=device).index_add_(0, group, real)
