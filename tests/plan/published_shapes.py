"""Blueprints of published models, and of a windowed one, for the tests of memory and computation."""

from moekit.config.presets.load import load_run
from moekit.plan.blueprint import Attention, Blueprint, Mixture, Weight
from moekit.plan.from_config import blueprint_of


def published(name: str) -> Blueprint:
    return blueprint_of(load_run(name).model, name, "moekit")


def windowed() -> Blueprint:
    """Four layers, half of which see 8 tokens back; a tied head; one mixture."""
    weights = (
        Weight("embedding", "embedding", (100, 16), 1, 1, "lookup", False),
        Weight("attention", "q", (32, 16), 4, 4),
        Weight("routed", "experts, gate and up", (8, 16), 64, 16),
        Weight("routed", "experts, down", (16, 8), 32, 8),
        Weight("router", "selection bias", (8,), 4, 4, "vector", False),
        Weight("head", "head", (100, 16), 0, 1, blocks=False),
    )
    near = Attention("gqa", 2, 4, 2, 8, 8, 32, 64, window=8)
    far = Attention("gqa", 2, 4, 2, 8, 8, 32, 64)
    return Blueprint("windowed", "none", 16, 100, 4, 64, weights, (near, far), (Mixture(4, 8, 2, 384, 0),))
