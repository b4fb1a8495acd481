"""The model families of the Hugging Face hub: `config.json` and tensor names of each, both ways, as data."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from moekit.config.codec import to_dict, update
from moekit.config.errors import ConfigError, InputError, check
from moekit.config.families import deepseek_v3
from moekit.config.model import ModelConfig

Names = Mapping[str, str | tuple[str, ...]]
"""Our tensor to the hub's. `{layer}` is a block; `{expert}` goes along the first dimension; several names share the
rows of one tensor evenly, in order."""


class Family(NamedTuple):
    """How a family writes a configuration and names its tensors.

    `to_hub` gives None for what the family cannot express, `names` None where the hub's names are ours. `copies` are
    tensors that only repeat another of ours, `zeros` those that other readers want and that hold nothing but zeros.
    """

    model_type: str
    to_hub: Callable[[ModelConfig], dict[str, Any] | None]
    from_hub: Callable[[Mapping[str, Any]], ModelConfig]
    names: Callable[[ModelConfig], Names | None]
    copies: Callable[[ModelConfig], Mapping[str, str]]
    zeros: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]]


def _own_to_hub(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "moekit", "architectures": ["MoekitForCausalLM"], "model": to_dict(config)}


def _own_from_hub(data: Mapping[str, Any]) -> ModelConfig:
    unknown = sorted(data.keys() - OWN)
    check(not unknown, "".join(unknown[:1]), f"not understood: {', '.join(unknown)}")
    model = data.get("model")
    check(isinstance(model, dict), "model", "is missing, or no object")
    try:
        return update(ModelConfig(), model or {})
    except ConfigError as error:
        raise error.inside("model") from None


OWN = {"model_type", "architectures", "model", "bos_token_id", "eos_token_id", "dtype", "transformers_version"}
"""What a `config.json` of the last family may hold."""

FAMILIES = (
    Family(
        "deepseek_v3",
        deepseek_v3.to_hub,
        deepseek_v3.from_hub,
        deepseek_v3.names,
        deepseek_v3.copies,
        deepseek_v3.zeros,
    ),
    Family("moekit", _own_to_hub, _own_from_hub, lambda _: None, lambda _: {}, lambda _: {}),
)
"""In order of preference. The last one expresses every model, with our own names, for moekit alone."""


def family_for(config: ModelConfig) -> Family:
    """The first family that expresses `config`: what it writes, it reads back as a model that computes the same."""
    return next(family for family in FAMILIES if _expresses(family, config))


def _expresses(family: Family, config: ModelConfig) -> bool:
    written = family.to_hub(config)
    if written is None:
        return False
    try:
        return meaning(family.from_hub(written)) == meaning(config)
    except ConfigError:
        return False


def meaning(config: ModelConfig) -> ModelConfig:
    """The configuration with its fields that have no effect at their defaults."""
    routing = config.moe.routing
    if routing.top_k_groups == routing.n_groups:
        routing = replace(routing, group_score="max")
    if not routing.renormalise:
        routing = replace(routing, epsilon=0.0)
    return replace(config, moe=replace(config.moe, width=0, routing=routing))


def family_named(model_type: object, where: str) -> Family:
    """The family whose `model_type` is given in the file `where`."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise InputError(f"{where}: model_type {model_type!r} is not supported", f"supported: {known}")
