"""V-MoE (arXiv 2106.05974): vision transformers with 32 experts, two per patch, in every other layer or the last."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moekit.plan.blueprint import Attention, Blueprint, Mixture, Weight
from moekit.plan.bulk import Bulk

N_ROUTED, TOP_K, SIDE = 32, 2, 224
"""Experts in a layer, experts of a patch, rows and columns of an image in pixels."""

JFT_300M, JFT_3B = 18291, 29593
"""Classes of the data sets."""


class Shape(NamedTuple):
    """A vision transformer of which `mixed` layers are mixtures."""

    layers: int
    width: int
    inner: int
    n_heads: int
    patch: int
    mixed: int
    published: str
    classes: int = JFT_300M
    representation: bool = True


SHAPES = {
    "v-moe-s32": Shape(8, 512, 2048, 8, 32, 4, "296.9M"),
    "v-moe-b16": Shape(12, 768, 3072, 12, 16, 6, "979.0M"),
    "v-moe-b32": Shape(12, 768, 3072, 12, 32, 6, "980.6M"),
    "v-moe-l16": Shape(24, 1024, 4096, 16, 16, 12, "3446.0M"),
    "v-moe-h14": Shape(32, 1280, 5120, 16, 14, 16, "7160.8M"),
    "v-moe-h14-last5": Shape(32, 1280, 5120, 16, 14, 5, "2688.6M"),
    "v-moe-15b": Shape(48, 1408, 6400, 16, 14, 24, "14705.1M", JFT_3B, False),
}

NOTES = (
    "biases, a class token, positions for images of 224 x 224 and the head are counted; the vocabulary is the classes",
)

LARGEST = "the head of JFT-3B without a layer before it is the one with which the published size comes out"


def vmoe(name: str) -> Blueprint:
    """The model `name` of SHAPES. A token is a patch of the image; nothing is kept from token to token."""
    shape = SHAPES[name]
    width, inner, layers, patches = shape.width, shape.inner, shape.layers, (SIDE // shape.patch) ** 2
    bulk = Bulk()
    bulk.add("embedding", "patches", (width, 3 * shape.patch**2), 1, blocks=False)
    bulk.add("embedding", "patches, bias and class token", (width,), 2, kind="vector")
    bulk.add("embedding", "positions", (patches + 1, width), 1, kind="lookup")
    bulk.add("attention", "q, k, v and output", (width, width), 4 * layers)
    bulk.add("attention", "biases", (width,), 4 * layers, kind="vector")
    _feed_forwards(bulk, shape)
    bulk.add("norms", "norms, weight and bias", (width,), 2 * (2 * layers + 1), kind="vector")
    if shape.representation:
        bulk.add("head", "layer before the head", (width, width), 1, blocks=False)
        bulk.add("head", "layer before the head, bias", (width,), 1, kind="vector")
    bulk.add("head", "head, bias", (shape.classes,), 1, kind="vector")
    head = Weight("head", "head", (shape.classes, width), 1, 1, blocks=False)
    head_dim = width // shape.n_heads
    seen = Attention("mha", layers, shape.n_heads, shape.n_heads, head_dim, head_dim, 0, 0, causal=False)
    expert = 2 * width * inner + inner + width
    mixture = Mixture(shape.mixed, N_ROUTED, TOP_K, expert, 0)
    notes = (
        f"published: {shape.published}, which these shapes give",
        *NOTES,
        *([] if shape.representation else [LARGEST]),
    )
    weights = (*bulk.weights, head)
    return Blueprint(
        name, "v_moe", width, shape.classes, layers, patches + 1, weights, (seen,), (mixture,), notes=notes
    )


def _feed_forwards(bulk: Bulk, shape: Shape) -> None:
    width, inner = shape.width, shape.inner
    dense, stored, used = shape.layers - shape.mixed, shape.mixed * N_ROUTED, shape.mixed * TOP_K
    for into, out in ((inner, width), (width, inner)):
        bulk.add("dense", f"dense, to {into}", (into, out), dense)
        bulk.add("dense", f"dense, to {into}, bias", (into,), dense, kind="vector")
        bulk.choose("routed", f"experts, to {into}", (into, out), stored, used)
        bulk.choose("routed", f"experts, to {into}, bias", (into,), stored, used, "vector")
    bulk.add("router", "router", (N_ROUTED, width), shape.mixed, blocks=False)


MODELS: Mapping[str, Callable[[str], Blueprint]] = dict.fromkeys(SHAPES, vmoe)
