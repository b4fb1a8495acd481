"""Places that found no room go to the token's next best expert that has some."""

import torch

from moekit.moe.capacity.queue import Queue, within_room
from moekit.moe.routing import Routing
from moekit.tensors import Bool, Float, Int, Tensor

Pools = tuple[tuple[int, int], ...]


def to_next_best(
    served: Int[Tensor, "T K"],
    routing: Routing,
    ranking: Float[Tensor, "T E"],
    lost: Queue,
    group: Int[Tensor, " T"],
    room: Int[Tensor, "G E"],
    pools: Pools,
) -> Int[Tensor, "T K"]:
    """`served`, where the places of `lost` are served by experts that had room left: `room[g, e]` places in group g.

    In rounds: each lost place asks the token's best expert (by `ranking`, above -inf) of the pool of its first choice
    that has room and neither serves the token nor is asked for another of its places. The line is that of the first
    round. Whoever is turned away has filled an expert, so the rounds end. An expert of score 0 would serve with a
    weight of 0, and is not asked.
    """
    served, room = served.clone(), room.clone()
    while len(lost.token):
        tokens, row = lost.token.unique(return_inverse=True)
        closed = (room[group[tokens]] <= 0) | (routing.scores[tokens] <= 0) | _members(served[tokens], room.shape[-1])
        wish = ranking[tokens].masked_fill_(closed, -torch.inf)
        asked = _asked(wish, row, lost.place, lost.of(routing.experts), pools)
        lost, asked = lost.at(asked >= 0), asked[asked >= 0]
        bins = group[lost.token] * room.shape[-1] + asked
        kept = within_room(bins, room.flatten())
        served[lost.token[kept], lost.place[kept]] = asked[kept]
        room -= torch.bincount(bins[kept], minlength=room.numel()).view_as(room)
        lost = lost.at(~kept)
    return served


def _members(experts: Int[Tensor, "U K"], n_experts: int) -> Bool[Tensor, "U E"]:
    """Which experts are in a row; -1 is none."""
    found = torch.zeros(len(experts), n_experts + 1, dtype=torch.bool, device=experts.device)
    return found.scatter_(-1, experts.remainder(n_experts + 1), True)[:, :-1]


def _asked(
    wish: Float[Tensor, "U E"],
    row: Int[Tensor, " P"],
    place: Int[Tensor, " P"],
    old: Int[Tensor, " P"],
    pools: Pools,
) -> Int[Tensor, " P"]:
    """The expert that each lost place asks, another for each place of a token; -1 where none is left."""
    asked = torch.full_like(row, -1)
    for number in range(int(place.max()) + 1):
        at = (place == number).nonzero().flatten()
        first = 0
        for size, _ in pools:
            mine = at[(old[at] >= first) & (old[at] < first + size)]
            if len(mine):
                # Of equals, max finds the first.
                value, best = wish[row[mine], first : first + size].max(dim=-1)
                asked[mine] = torch.where(value > -torch.inf, best + first, -1)
                wish[row[mine], best + first] = -torch.inf
            first += size
    return asked


def moved_weights(routing: Routing, served: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """w s_new / s_old where another expert serves: a weight of scale x s_old becomes scale x s_new.

    A score below the least normal number gives 0 in place of a ratio without meaning.
    """
    moved = (served >= 0) & (served != routing.experts)
    if not moved.any():
        return routing.weights
    old = routing.scores.gather(-1, routing.experts.clamp_min(0))
    new = routing.scores.gather(-1, served.clamp_min(0))
    least = torch.finfo(old.dtype).tiny
    ratio = (routing.weights / old.clamp_min(least)).masked_fill(old < least, 0)
    return torch.where(moved, ratio * new, routing.weights)
