"""Our own family, which expresses every model with our own names, for moekit alone."""

from collections.abc import Mapping
from typing import Any

from moekit.config.codec import to_dict, update
from moekit.config.errors import ConfigError, check
from moekit.config.families.family import Family
from moekit.config.families.trunk import check_layers
from moekit.config.model import ModelConfig
from moekit.config.quantisation import KEY

KNOWN = {
    "model_type",
    "architectures",
    "model",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "transformers_version",
    KEY,
}
"""What a `config.json` of this family may hold."""


def to_hub(config: ModelConfig) -> dict[str, Any]:
    """`config.json`: the configuration as it is."""
    return {"model_type": "moekit", "architectures": ["MoekitForCausalLM"], "model": to_dict(config)}


def from_hub(data: Mapping[str, Any]) -> ModelConfig:
    """The model that `config.json` describes. Raises ConfigError for what is missing, wrong or not understood."""
    unknown = sorted(data.keys() - KNOWN)
    check(not unknown, "".join(unknown[:1]), f"not understood: {', '.join(unknown)}")
    model = data.get("model")
    check(isinstance(model, dict), "model", "is missing, or no object")
    try:
        config = update(ModelConfig(), model or {})
    except ConfigError as error:
        raise error.inside("model") from None
    check_layers(config.n_layers, "model.n_layers")
    return config


FAMILY = Family("moekit", to_hub, from_hub, lambda _: None)
