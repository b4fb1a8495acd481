"""Gather a model's tensors in bulk: many of one shape at a time."""

from dataclasses import dataclass, field
from typing import Literal

from moekit.plan.blueprint import Part, Weight

Kind = Literal["product", "lookup", "vector"]


@dataclass
class Bulk:
    """The weights gathered so far."""

    weights: list[Weight] = field(default_factory=list)

    def add(
        self,
        part: Part,
        name: str,
        shape: tuple[int, ...],
        count: int,
        met: bool = True,
        kind: Kind = "product",
        blocks: bool = True,
    ) -> None:
        """`count` tensors of one shape, none of which is left out; `met`: a token meets each of them."""
        self.choose(part, name, shape, count, count if met else 0, kind, blocks)

    def choose(
        self,
        part: Part,
        name: str,
        shape: tuple[int, ...],
        count: int,
        used: int,
        kind: Kind = "product",
        blocks: bool = True,
    ) -> None:
        """`count` tensors of one shape, of which a token meets `used`."""
        if count:
            self.weights.append(Weight(part, name, shape, count, used, kind, blocks and kind == "product"))
