"""How many experts, devices and nodes tokens reach: expectations of uniform, independent choices, and limits."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


def distinct_experts(n_routed: int, top_k: int, tokens: int) -> float:
    """Expected experts of a layer that `tokens` tokens choose between them: E (1 - (1 - K/E)^T).

    Every token chooses uniformly and independently. Tokens that choose alike, or experts of unequal load, make it less.
    """
    if top_k >= n_routed:
        return float(n_routed if tokens else 0)
    return -n_routed * math.expm1(tokens * math.log1p(-top_k / n_routed))


def rows_per_expert(n_routed: int, top_k: int, tokens: int) -> float:
    """Expected rows of a product of an expert that is chosen at all: T K over the distinct experts."""
    return tokens * top_k / distinct_experts(n_routed, top_k, tokens)


class Reach(NamedTuple):
    """Places (devices or nodes) that one token's experts lie on: expected, and at most."""

    expected: float
    most: int


def reach(places: Iterable[int], top_k: int, n_groups: int = 1, top_k_groups: int = 1) -> Reach:
    """Places that a token reaches, where `places` names the place of each expert, in the experts' order.

    The token takes K experts, uniformly out of M of the G equal groups, themselves uniformly chosen. For E experts
    spread evenly over D places without groups the expectation is D (1 - C(E - E/D, K) / C(E, K)). `most` is exact where
    a place holds whole groups or a part of one, and not too low elsewhere.
    """
    place_of = tuple(places)
    group_size = len(place_of) // n_groups
    held = Counter((place, expert // group_size) for expert, place in enumerate(place_of))
    shares: dict[int, list[int]] = {}
    for (place, _), count in held.items():
        shares.setdefault(place, []).append(count)
    patterns = Counter(tuple(sorted(counts)) for counts in shares.values())
    missed = sum(
        times * _missed(counts, group_size, top_k, n_groups, top_k_groups) for counts, times in patterns.items()
    )
    crossed = Counter(group for _, group in held)
    widest = sum(sorted(crossed.values())[-top_k_groups:])
    return Reach(len(shares) - missed, min(top_k, widest, len(shares)))


def _missed(held: tuple[int, ...], group_size: int, top_k: int, n_groups: int, top_k_groups: int) -> float:
    """The chance that no expert of a place is taken, which holds `held` experts of each group it has a part of."""
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})
    for count in held:
        ways += Counter({(groups + 1, taken + count): n for (groups, taken), n in ways.items()})
    open_experts = top_k_groups * group_size
    choices = sum(
        n * math.comb(n_groups - len(held), top_k_groups - groups) * math.comb(open_experts - taken, top_k)
        for (groups, taken), n in ways.items()
        if groups <= top_k_groups
    )
    return choices / (math.comb(n_groups, top_k_groups) * math.comb(open_experts, top_k))
