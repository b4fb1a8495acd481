"""GShard's translation models (arXiv 2006.16668, table 1): every other layer a mixture, two experts per token."""

from collections.abc import Callable, Mapping

from moekit.plan.blueprint import Blueprint
from moekit.plan.papers.encoder_decoder import Pair, blueprint_of_pair

SHAPES = {
    "gshard-600b": (2048, 36, "600B", "618B"),
    "gshard-200b": (2048, 12, "200B", "206B"),
    "gshard-150b": (512, 36, "150B", "155B"),
    "gshard-50b": (512, 12, "50B", "51.5B"),
    "gshard-37b": (128, 36, "37B", "38.7B"),
    "gshard-12.5b": (128, 12, "12.5B", "12.9B"),
}
"""Experts in a layer, layers of encoder and decoder together, published size, what the experts of these shapes hold."""

NOTES = (
    "width 1024, inner width 8192 and two matrices per expert fit the published sizes",
    "assumed: 16 heads of 128, a vocabulary of 64000, embedding and head tied, sentences of up to 1024 tokens; this is "
    "below 3% of what is stored",
)


def gshard(name: str) -> Blueprint:
    """The model `name` of SHAPES."""
    n_routed, layers, published, derived = SHAPES[name]
    notes = (f"published: {published}; the experts of these shapes hold {derived}", *NOTES)
    sizes = (1024, 8192, 16, 128, layers // 2, 2, n_routed, 2, 2)
    return blueprint_of_pair(Pair(name, "gshard", 64000, *sizes, 1024, True, notes))


MODELS: Mapping[str, Callable[[str], Blueprint]] = dict.fromkeys(SHAPES, gshard)
