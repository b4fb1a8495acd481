"""Shapes of models that only a paper describes, one file per paper, with what was published beside what they give."""

from collections.abc import Callable, Mapping

from moekit.plan.blueprint import Blueprint
from moekit.plan.papers import deepseekmoe, glam, grok, gshard, mmoe, switch, vmoe

PAPERS: Mapping[str, Callable[[str], Blueprint]] = {
    **deepseekmoe.MODELS,
    **glam.MODELS,
    **grok.MODELS,
    **gshard.MODELS,
    **mmoe.MODELS,
    **switch.MODELS,
    **vmoe.MODELS,
}
"""What builds the blueprint of each name."""


def paper_names() -> list[str]:
    """The names `paper` knows."""
    return sorted(PAPERS)


def paper(name: str) -> Blueprint:
    """The blueprint of a paper's model. Raises KeyError for another name."""
    return PAPERS[name](name)
