"""GLaM (arXiv 2112.06905, table 4): every other layer a mixture of 64 experts of which a token takes two."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moekit.plan.blueprint import Blueprint
from moekit.plan.decoder import Decoder, Dense, Experts, Heads, blueprint_of_decoder

NOTES = (
    "dense feed-forwards are gated (3 matrices), experts are not (2 matrices); embedding and head are one matrix; "
    "norms, biases and routers are left out: so the published figures come out",
)


class Shape(NamedTuple):
    """A row of table 4. The vocabulary is the one with which the published figures come out."""

    layers: int
    width: int
    inner: int
    n_heads: int
    head_dim: int
    vocab_size: int
    published: str


SHAPES = {
    "glam-64b-64e": Shape(64, 8192, 32768, 128, 128, 256000, "1.2T, 96.6B active: these shapes give 1161.7B, 96.6B"),
    "glam-8b-64e": Shape(32, 4096, 16384, 32, 128, 32768, "143B, 9.8B active: these shapes give 142.9B, 9.8B"),
    "glam-1.7b-64e": Shape(24, 2048, 8192, 16, 128, 32768, "27B, 1.879B active: these shapes give 26.8B, 1.879B"),
    "glam-0.1b-64e": Shape(
        12,
        768,
        3072,
        12,
        64,
        32768,
        "1.9B, 145M active: these shapes give 1.9B, 153M; which vocabulary the 145M count is not known",
    ),
}


def glam(name: str) -> Blueprint:
    """The model `name` of SHAPES."""
    shape = SHAPES[name]
    half = shape.layers // 2
    decoder = Decoder(
        name,
        "glam",
        shape.vocab_size,
        shape.width,
        1024,
        Heads(shape.n_heads, shape.n_heads, shape.head_dim),
        ((Dense(shape.inner), half), (Experts(64, 2, shape.inner, matrices=2, router=False), half)),
        norms=0,
        tied=True,
        notes=(f"published: {shape.published}", *NOTES),
    )
    return blueprint_of_decoder(decoder)


MODELS: Mapping[str, Callable[[str], Blueprint]] = dict.fromkeys(SHAPES, glam)
