"""Times of repeated work, on a machine that others may be using."""

import time
from collections.abc import Callable


def least_seconds(work: Callable[[], object], repeats: int, warm: int = 1) -> float:
    """Do `work` `warm` times uncounted, then `repeats` times; the shortest of them, which nothing disturbed."""
    for _ in range(warm):
        work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
