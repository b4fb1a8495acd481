"""What one token sends between devices to reach its experts, and what comes back."""

import math
from typing import NamedTuple

from moekit.plan.experts import Reach


class Copies(NamedTuple):
    """Expected copies of one token that are sent to another device inside a node, and to another node."""

    inside: float
    across: float


class Seconds(NamedTuple):
    """Times of one layer for one direction on both links; they overlap."""

    inside: float
    across: float

    @property
    def longer(self) -> float:
        """The link that takes longer."""
        return max(self)


def forwarded(by_device: Reach, by_node: Reach, devices: int, per_node: int) -> Copies:
    """DeepSeek-V3's way (arXiv 2412.19437, section 3.2.2): once to each other node, to the device of the same place
    there, and from it to the devices inside. A token starts on any of N nodes and at any of P places, so that a reached
    node is another one with 1 - 1/N, and a reached device at another place with 1 - 1/P.
    """
    nodes = devices // per_node
    return Copies(by_device.expected * (1 - 1 / per_node), by_node.expected * (1 - 1 / nodes))


def direct(by_device: Reach, devices: int, per_node: int) -> Copies:
    """The naive way: one copy straight to each reached device."""
    nodes = devices // per_node
    return Copies(by_device.expected * (per_node - 1) / devices, by_device.expected * (1 - 1 / nodes))


def dispatch_bytes(width: int) -> int:
    """Bytes of a token on its way to an expert: FP8 and a float32 scale for each 128 numbers."""
    return width + 4 * math.ceil(width / 128)


def combine_bytes(width: int) -> int:
    """Bytes of a token on its way back: bfloat16."""
    return 2 * width
