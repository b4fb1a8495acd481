"""Routings that ask for more room than there is, and what the twin of a capacity makes of them."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from routing_cases import generator, seeds

import oracle.capacity as twin
from moekit.config.moe import MoEConfig
from moekit.config.routing import TwoPoolRouting
from moekit.moe.routing import Routing

DROPS = ("position", "probability", "batch_priority", "random")


class Shape(NamedTuple):
    """Sizes and oddities of a routing of `n_sequences` sequences of `length` tokens; `common` makes two pools."""

    seed: int
    n_sequences: int
    length: int
    n_experts: int
    top_k: int
    common: int
    pattern: str
    padded: bool
    ties: bool
    reach: float

    def config(self, **settings: Any) -> MoEConfig:
        pools = {"routing": TwoPoolRouting(n_common=self.common)} if self.common else {}
        return MoEConfig(width=4, n_routed=self.n_experts, top_k=self.top_k, **pools, **settings)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    common = draw(st.sampled_from([0, 0, 1, 2]))
    others = draw(st.integers(1, 5))
    return Shape(
        seed=draw(seeds),
        n_sequences=draw(st.integers(1, 4)),
        length=draw(st.sampled_from([0, 1, 2, 5, 9])),
        n_experts=common + others,
        top_k=draw(st.integers(1, others)) + (common > 0),
        common=common,
        pattern=draw(st.sampled_from(["any", "same_for_all", "with_holes", "all_empty"])),
        padded=draw(st.booleans()),
        ties=draw(st.booleans()),
        reach=draw(st.sampled_from([1.0, 1.0, 0.6])),
    )


class Asked(NamedTuple):
    """A routing before capacities, and the order of each token's experts."""

    routing: Routing
    ranking: torch.Tensor


def asked(shape: Shape) -> Asked:
    """A token's choices are the best by `ranking` in each pool, weights twice their scores; some rows end empty."""
    source, (n_tokens, n_experts) = generator(shape.seed), (shape.n_sequences * shape.length, shape.n_experts)
    scores = torch.rand(n_tokens, n_experts, generator=source) * 0.9 + 0.1
    if shape.ties:
        scores = (scores * 3).ceil() / 4
    if shape.pattern == "same_for_all":
        scores = scores[:1].expand(n_tokens, -1).contiguous()
    experts = chosen(scores, shape)
    if shape.pattern == "with_holes":
        kept = torch.randint(0, shape.top_k + 1, (n_tokens, 1), generator=source)
        experts = experts.masked_fill(torch.arange(shape.top_k) >= kept, -1)
    elif shape.pattern == "all_empty":
        experts = torch.full_like(experts, -1)
    weights = 2 * scores.gather(-1, experts.clamp_min(0)).masked_fill(experts < 0, 0)
    far = (torch.rand(n_tokens, n_experts, generator=source) > shape.reach).scatter(-1, experts.clamp_min(0), False)
    mask = torch.rand(n_tokens, generator=source) < 0.6 if shape.padded else None
    routing = Routing(experts, weights, scores, scores.logit(), shape.n_sequences, mask=mask)
    return Asked(routing, scores.masked_fill(far, -torch.inf))


def chosen(scores: torch.Tensor, shape: Shape) -> torch.Tensor:
    if not shape.common:
        return scores.topk(shape.top_k, dim=-1).indices
    rest = scores[:, shape.common :].topk(shape.top_k - 1, dim=-1).indices + shape.common
    return torch.cat([scores[:, : shape.common].argmax(dim=-1, keepdim=True), rest], dim=-1)


def pools(config: MoEConfig) -> list[range]:
    found, first = [], 0
    for size, _ in config.pools:
        found.append(range(first, first + size))
        first += size
    return found


def real(routing: Routing) -> list[bool]:
    return [True] * len(routing.experts) if routing.mask is None else routing.mask.tolist()


def by_the_twin(
    given: Asked, config: MoEConfig, factors: list[float], drop: str, seed: int, by_sequence: bool, next_best: bool
) -> list[list[int]]:
    """Who is served where each expert has room for so many."""
    routing = given.routing
    experts, counts = routing.experts.tolist(), real(routing)
    length = max(len(experts) // routing.n_sequences, 1)
    groups = [t // length if by_sequence else 0 for t in range(len(experts))]
    asks = sum(counts[t] and expert >= 0 for t, row in enumerate(experts) for expert in row)
    chance = torch.randperm(asks, generator=generator(seed)).tolist()
    order = twin.line(experts, routing.weights.tolist(), counts, drop, chance)
    per_token, n = sum(k for _, k in config.pools), config.n_choices
    rooms = []
    for group in range(routing.n_sequences if by_sequence else 1):
        tokens = sum(is_real for t, is_real in enumerate(counts) if groups[t] == group)
        rooms.append([twin.room(factor, tokens * per_token, n) for factor in factors])
    served, left, waiting = twin.by_experts(experts, order, counts, groups, rooms)
    if next_best:
        twin.next_best(served, left, waiting, experts, groups, given.ranking.tolist(), pools(config))
    return served


def twin_weights(routing: Routing, served: list[list[int]]) -> torch.Tensor:
    weights, scores, experts = routing.weights.tolist(), routing.scores.tolist(), routing.experts.tolist()
    for t, row in enumerate(served):
        for k, expert in enumerate(row):
            if expert < 0:
                weights[t][k] = 0.0
            elif expert != experts[t][k]:
                weights[t][k] = twin.weight(weights[t][k], scores[t][experts[t][k]], scores[t][expert])
    return torch.tensor(weights).view_as(routing.weights)
