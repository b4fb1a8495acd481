"""Capacities, one file each, named by their kind: `Limit` of `moekit.moe.capacity.<kind>`."""

from importlib import import_module

from moekit.config.moe import MoEConfig
from moekit.moe.capacity.limit import CapacityLimit


def build_capacity(config: MoEConfig) -> CapacityLimit | None:
    """The limit of a layer; None where every token is served."""
    if config.capacity is None:
        return None
    return import_module(f"{__name__}.{config.capacity.kind}").Limit(config.capacity, config)


__all__ = ["CapacityLimit", "build_capacity"]
