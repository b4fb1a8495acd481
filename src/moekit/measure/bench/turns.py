"""Programs take turns at the same work, so that what disturbs the machine disturbs them alike; medians count."""

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

LIMIT = "limit"
"""The program that is no program: what the machine can do at most."""

OURS = "moekit"

MOST_STEPS = 50
"""Times that the work is done in one turn, at most."""

TRIES = 3
"""Times that the work is done to warm up, but not after HEAVY seconds of it."""

HEAVY = 4.0
"""Seconds."""

FAR_BEHIND = 1.5
"""A program's variant that takes so many times its fastest one's time while warming up takes no turns: that time, the
best of its tries, is its figure."""


class Entrant(NamedTuple):
    """A way to do the work: `turn` does it once and tells the seconds. `amount` of the row's unit is done by it."""

    program: str
    variant: str
    amount: float
    turn: Callable[[], float]


class Pace(NamedTuple):
    """How many rounds there are, and for how many seconds an entrant repeats its work in each."""

    rounds: int
    seconds: float


class Timing(NamedTuple):
    """An entrant and the median of its seconds; `spread` is the range of their middle half, in parts of the median."""

    program: str
    variant: str
    amount: float
    seconds: float
    spread: float

    @property
    def name(self) -> str:
        """For readers; the limit goes by what it is."""
        return self.variant if self.program == LIMIT else f"{self.program} {self.variant}".strip()


def clocked(work: Callable[[], object]) -> Callable[[], float]:
    """`work` that tells how many seconds it took."""

    def turn() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return turn


def take_turns(entrants: Sequence[Entrant], pace: Pace) -> list[Timing]:
    """Warm all entrants up, then let one after the other do its work, round by round."""
    warm = [_warm_up(entrant) for entrant in entrants]
    behind = [
        seconds > FAR_BEHIND * _best(entrant, entrants, warm) for entrant, seconds in zip(entrants, warm, strict=True)
    ]
    seconds = [[found] if out else list[float]() for found, out in zip(warm, behind, strict=True)]
    for _ in range(pace.rounds):
        for index, entrant in enumerate(entrants):
            if not behind[index]:
                steps = min(max(round(pace.seconds / max(warm[index], 1e-9)), 1), MOST_STEPS)
                seconds[index] += [entrant.turn() for _ in range(steps)]
    return [
        Timing(*entrant[:3], median(found), _spread(found)) for entrant, found in zip(entrants, seconds, strict=True)
    ]


def _warm_up(entrant: Entrant) -> float:
    """The seconds of the fastest try."""
    tries: list[float] = []
    while len(tries) < TRIES and sum(tries) < HEAVY:
        tries.append(entrant.turn())
    return min(tries)


def _best(entrant: Entrant, entrants: Sequence[Entrant], seconds: Sequence[float]) -> float:
    """The fastest of the variants of the entrant's program."""
    return min(found for other, found in zip(entrants, seconds, strict=True) if other.program == entrant.program)


def _spread(seconds: Sequence[float]) -> float:
    if len(seconds) == 1:
        return 0.0
    low, middle, high = quantiles(seconds, method="inclusive")
    return (high - low) / middle
