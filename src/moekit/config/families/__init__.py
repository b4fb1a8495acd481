"""The model families of the Hugging Face hub: `config.json` and tensor names of each, both ways, as data."""

from moekit.config.balance import BiasBalance
from moekit.config.errors import ConfigError, InputError
from moekit.config.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    llama,
    mixtral,
    olmoe,
    own,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moekit.config.families.family import Family, Names
from moekit.config.families.meaning import meaning
from moekit.config.model import ModelConfig
from moekit.config.routing import TopKRouting

__all__ = ["FAMILIES", "Family", "Names", "family_for", "family_named", "meaning"]

FAMILIES = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    deepseek_v3.FAMILY,
    deepseek_v2.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
    deepseek.FAMILY,
    own.FAMILY,
)
"""In order of preference: first what most readers open. The last one expresses every model."""


def family_for(config: ModelConfig, prefer: str | None = None) -> Family:
    """The first family that expresses `config`: what it writes, it reads back as a model that computes the same.

    The family with the model type `prefer` comes before all others.
    """
    ordered = sorted(FAMILIES, key=lambda family: family.model_type != prefer)
    return next(family for family in ordered if _expresses(family, config))


def _expresses(family: Family, config: ModelConfig) -> bool:
    if family is own.FAMILY:
        return True
    if config.moe_layers and not isinstance(config.moe.routing, TopKRouting):
        return False
    if any(isinstance(rule, BiasBalance) and not rule.released for rule in config.moe.balance):
        return False
    written = family.to_hub(config)
    if written is None:
        return False
    try:
        return meaning(family.from_hub(written)) == meaning(config)
    except ConfigError:
        return False


def family_named(model_type: object, where: str) -> Family:
    """The family whose `model_type` is given in the file `where`."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise InputError(f"{where}: model_type {model_type!r} is not supported", f"supported: {known}")
