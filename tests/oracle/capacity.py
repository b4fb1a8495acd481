"""Capacities as the papers describe them: one place of one token after the other, on lists.

`experts[t][k]` is what token t chose k-th, -1 for nothing; `real[t]` is False for padding.
"""

import math

Table = list[list[int]]
Numbers = list[list[float]]
Place = tuple[int, int]


def room(factor: float, places: int, n: int) -> int:
    """ceil(factor x places / n) with at least 1 (arXiv 2101.03961, eq 3); rounded first, so that 1.1 x 10 is 11."""
    return max(1, math.ceil(round(factor * places / n, 5)))


def line(experts: Table, weights: Numbers, real: list[bool], drop: str, chance: list[int] | None = None) -> list[Place]:
    """Who is served first. All first choices come before all second choices (arXiv 2106.05974, Algorithms 1 and 2)."""
    places = [(t, k) for k in range(len(experts[0]) if experts else 0) for t in range(len(experts))]
    asking = [(t, k) for t, k in places if real[t] and experts[t][k] >= 0]
    if drop == "probability":
        return sorted(asking, key=lambda at: -weights[at[0]][at[1]])
    if drop == "batch_priority":
        return sorted(asking, key=lambda at: (at[1], -max(weights[at[0]])))
    if drop == "random":
        assert chance is not None
        return [asking[number] for number in chance]
    return asking


def untouched(experts: Table, real: list[bool]) -> Table:
    """Nobody is served yet but padding, which takes no room."""
    return [[-1] * len(row) if counts else list(row) for row, counts in zip(experts, real, strict=True)]


def by_experts(
    experts: Table, order: list[Place], real: list[bool], groups: list[int], rooms: Table
) -> tuple[Table, Table, list[Place]]:
    """Who is served, the room that is left, `rooms[g][e]`, and who waits."""
    served, left, waiting = untouched(experts, real), [list(row) for row in rooms], []
    for t, k in order:
        expert = experts[t][k]
        if left[groups[t]][expert] > 0:
            served[t][k] = expert
            left[groups[t]][expert] -= 1
        else:
            waiting.append((t, k))
    return served, left, waiting


def next_best(
    served: Table,
    left: Table,
    waiting: list[Place],
    experts: Table,
    groups: list[int],
    ranking: Numbers,
    pools: list[range],
) -> None:
    """Rounds in which every waiting place asks its token's best expert with room; changes `served` and `left`."""
    while waiting:
        asked: dict[Place, int] = {}
        for t, k in sorted(waiting):
            pool = next(pool for pool in pools if experts[t][k] in pool)
            taken = served[t] + [asked[other] for other in asked if other[0] == t]
            options = [e for e in pool if ranking[t][e] > -math.inf and left[groups[t]][e] > 0 and e not in taken]
            if options:
                asked[t, k] = max(options, key=lambda e: ranking[t][e])
        still = []
        for t, k in waiting:
            if (t, k) in asked and left[groups[t]][asked[t, k]] > 0:
                served[t][k] = asked[t, k]
                left[groups[t]][asked[t, k]] -= 1
            elif (t, k) in asked:
                still.append((t, k))
        waiting = still


def by_devices(
    experts: Table, weights: Numbers, real: list[bool], device_of: list[int], room: int, safe: list[bool]
) -> Table:
    """A device drops what weighs least until it is within its room, but nothing of safe tokens (arXiv 2405.04434)."""
    served = [list(row) for row in experts]
    for device in set(device_of):
        here = [(t, k) for t, k in line(experts, weights, real, "probability") if device_of[experts[t][k]] == device]
        excess = len(here) - room
        for t, k in reversed(here):
            if excess > 0 and not safe[t]:
                served[t][k] = -1
                excess -= 1
    return served


def weight(old: float, old_score: float, new_score: float) -> float:
    """Of an expert that serves in another's place."""
    return old / old_score * new_score
