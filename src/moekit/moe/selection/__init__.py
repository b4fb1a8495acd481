"""Selection rules, one file each, named by their kind: `Rule` of `moekit.moe.selection.<kind>`."""

from importlib import import_module

from moekit.config.moe import MoEConfig
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens


def build_selection(config: MoEConfig) -> SelectionRule:
    """The selection rule of a layer."""
    return import_module(f"{__name__}.{config.routing.kind}").Rule(config.routing, config)


__all__ = ["Selection", "SelectionRule", "Tokens", "build_selection"]
