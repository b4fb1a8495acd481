"""Times of repeated work, on a machine that others may be using."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Times(NamedTuple):
    """Seconds of one piece of work: the least, which nothing disturbed, and the usual."""

    best: float
    median: float


def timed(work: Callable[[], object], repeats: int, warm: int = 1) -> Times:
    """Do `work` `warm` times uncounted, then `repeats` times."""
    for _ in range(warm):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return Times(min(seconds), statistics.median(seconds))
