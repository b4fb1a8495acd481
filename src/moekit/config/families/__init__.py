"""The model families of the Hugging Face hub: `config.json` and tensor names of each, both ways, as data."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moekit.config.codec import to_dict, update
from moekit.config.errors import InputError
from moekit.config.families import deepseek_v3
from moekit.config.model import ModelConfig

Names = Mapping[str, str | tuple[str, ...]]
"""Our tensor to the hub's. `{layer}` is a block; `{expert}` goes along the first dimension; several names share the
rows of one tensor evenly, in order."""


class Family(NamedTuple):
    """How a family writes a configuration and names its tensors.

    `to_hub` gives None for what the family cannot express, `names` None where the hub's names are ours. `copies` are
    tensors that only repeat another of ours.
    """

    model_type: str
    to_hub: Callable[[ModelConfig], dict[str, Any] | None]
    from_hub: Callable[[Mapping[str, Any]], ModelConfig]
    names: Callable[[ModelConfig], Names | None]
    copies: Callable[[ModelConfig], Mapping[str, str]]


def _own_to_hub(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "moekit", "architectures": ["MoekitForCausalLM"], "model": to_dict(config)}


def _own_from_hub(data: Mapping[str, Any]) -> ModelConfig:
    return update(ModelConfig(), data.get("model", {}))


FAMILIES = (
    Family("deepseek_v3", deepseek_v3.to_hub, deepseek_v3.from_hub, deepseek_v3.names, deepseek_v3.copies),
    Family("moekit", _own_to_hub, _own_from_hub, lambda _: None, lambda _: {}),
)
"""In order of preference. The last one expresses every model, with our own names, for moekit alone."""


def family_for(config: ModelConfig) -> Family:
    """The first family that expresses `config` without loss: what it writes, it reads back as the same model."""
    for family in FAMILIES:
        written = family.to_hub(config)
        if written is not None and family.from_hub(written) == config:
            return family
    raise AssertionError("the last family expresses every model")


def family_named(model_type: object, where: str) -> Family:
    """The family whose `model_type` is given in the file `where`."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise InputError(f"{where}: model_type {model_type!r} is not supported", f"supported: {known}")
