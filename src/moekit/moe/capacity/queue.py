"""Who is served first: the places of a routing in the order in which they ask for room."""

from typing import NamedTuple

import torch

from moekit.config.capacity import Drop
from moekit.moe.routing import Routing
from moekit.tensors import Bool, Int, Tensor


class Queue(NamedTuple):
    """P places of a routing, `experts[token, place]`, the first to be served first."""

    token: Int[Tensor, " P"]
    place: Int[Tensor, " P"]

    def at(self, index: Int[Tensor, " Q"] | Bool[Tensor, " P"]) -> "Queue":
        """Some of the places, or all in another order."""
        return Queue(self.token[index], self.place[index])

    def of(self, table: Tensor) -> Tensor:
        """What a table [T K] holds at these places: [P]."""
        return table[self.token, self.place]

    def emptied(self, experts: Int[Tensor, "T K"]) -> Int[Tensor, "T K"]:
        """`experts` with -1 at these places."""
        return experts.index_put((self.token, self.place), torch.tensor(-1, device=experts.device))


def by_position(routing: Routing) -> Queue:
    """The places that ask for room, those of real tokens that are not empty: first choices of all tokens, then second.

    So do Switch (arXiv 2101.03961), GShard (arXiv 2006.16668, Alg. 1) and V-MoE (arXiv 2106.05974).
    """
    asking = routing.experts >= 0
    if routing.mask is not None:
        asking = asking & routing.mask.unsqueeze(-1)
    place, token = asking.T.nonzero(as_tuple=True)
    return Queue(token, place)


def queue(routing: Routing, drop: Drop, generator: torch.Generator | None) -> Queue:
    """The places in the order of a rule; ties by position.

    `batch_priority` is V-MoE's (arXiv 2106.05974, section 4.2): tokens by their largest weight, and again the first
    choices of all before any second one.
    """
    line, weights = by_position(routing), routing.weights.detach()
    if drop == "probability":
        return line.at(line.of(weights).argsort(descending=True, stable=True))
    if drop == "batch_priority":
        line = line.at(weights.amax(dim=-1)[line.token].argsort(descending=True, stable=True))
        return line.at(line.place.argsort(stable=True))
    if drop == "random":
        return line.at(torch.randperm(len(line.token), generator=generator, device=line.token.device))
    return line


def within_room(bins: Int[Tensor, " P"], room: Int[Tensor, " G"]) -> Bool[Tensor, " P"]:
    """Whether each is among the first `room[g]` of its bin g."""
    counts = torch.bincount(bins, minlength=len(room))
    order = bins.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[bins[order]]
    rank = torch.empty_like(bins).index_copy_(0, order, torch.arange(len(bins), device=bins.device) - first)
    return rank < room[bins]
