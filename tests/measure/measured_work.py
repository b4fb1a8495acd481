"""Work for child processes."""

import os

import torch


def hold(megabytes: int) -> int:
    """Hold that much memory for a moment."""
    block = torch.ones(megabytes << 18)
    return int(block[-1])


def fail() -> None:
    raise ValueError("on purpose")


def die() -> None:
    os._exit(9)
