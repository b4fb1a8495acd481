"""Switch Transformers (arXiv 2101.03961, table 9): T5 with one expert per token."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moekit.plan.blueprint import Blueprint
from moekit.plan.papers.encoder_decoder import Pair, blueprint_of_pair


class Shape(NamedTuple):
    """A row of table 9; its layers are those of the encoder, and of the decoder again."""

    width: int
    inner: int
    n_heads: int
    layers: int
    every: int
    n_routed: int
    matrices: int
    published: str


SHAPES = {
    "switch-base": Shape(768, 2048, 12, 12, 2, 128, 3, "7B: these shapes give 7.44B"),
    "switch-large": Shape(
        1024,
        2816,
        16,
        24,
        2,
        128,
        3,
        "26B: these shapes give 27.2B; the released configuration, 4096 wide without gates, 26.4B",
    ),
    "switch-xxl": Shape(
        4096,
        10240,
        64,
        24,
        2,
        128,
        3,
        "395B: these shapes give 394.7B with 128 experts; table 9 says 64, which would give 201B",
    ),
    "switch-c": Shape(
        2080,
        6144,
        32,
        15,
        1,
        2048,
        2,
        "1571B: these shapes give 1571.4B with table 9's 32 heads; the released configuration has 30",
    ),
}


def switch(name: str) -> Blueprint:
    """The model `name` of SHAPES, with T5's vocabulary and heads of 64."""
    row = SHAPES[name]
    sizes = (row.width, row.inner, row.n_heads, 64, row.layers, row.every, row.n_routed, 1, row.matrices)
    return blueprint_of_pair(Pair(name, "switch", 32128, *sizes, 512, False, (f"published: {row.published}",)))


MODELS: Mapping[str, Callable[[str], Blueprint]] = dict.fromkeys(SHAPES, switch)
