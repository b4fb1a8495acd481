"""Grok-1 (xAI, released in March 2024 as weights and JAX code)."""

from collections.abc import Callable, Mapping

from moekit.plan.blueprint import Blueprint
from moekit.plan.decoder import Decoder, Experts, Heads, blueprint_of_decoder


def grok_1(name: str) -> Blueprint:
    """Eight gated experts in each layer, four norms, embedding and head tied."""
    notes = (
        "published: 314B, 25% of the weights active (78.5B); the released code's shapes give 315.7B and 83.8B (26.5%)",
    )
    layers = ((Experts(8, 2, 32768), 64),)
    heads = Heads(48, 8, 128)
    return blueprint_of_decoder(
        Decoder(name, "grok", 131072, 6144, 8192, heads, layers, norms=4, tied=True, notes=notes)
    )


MODELS: Mapping[str, Callable[[str], Blueprint]] = {"grok-1": grok_1}
