"""Work for child processes."""

import os
import time
from collections.abc import Callable
from typing import NoReturn

import torch


def hold(megabytes: int) -> int:
    """Hold that much memory for a moment."""
    block = torch.ones(megabytes << 18)
    return int(block[-1])


def after(found: int) -> str:
    """Take more memory than the work did."""
    return f"after {hold(500 * found)}"


def fail() -> NoReturn:
    raise ValueError("on purpose")


def die() -> None:
    os._exit(9)


def growing(seconds: float, megabytes: int = 0) -> Callable[[], object]:
    """Work that takes so much longer each time, and holds memory for a moment."""
    waited = 0.0

    def work() -> None:
        nonlocal waited
        waited += seconds
        hold(megabytes + 1)
        time.sleep(waited)

    return work


def unmade() -> Callable[[], object]:
    return fail()


def failing() -> Callable[[], object]:
    return fail


def dying() -> Callable[[], object]:
    return die
