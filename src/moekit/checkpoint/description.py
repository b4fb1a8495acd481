"""What the `config.json` of a folder says; knows no torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moekit.config.errors import ConfigError, InputError
from moekit.config.families import Family, family_named
from moekit.config.files import read_json
from moekit.config.model import ModelConfig
from moekit.config.quantisation import Quantisation, read_quantisation


class Description(NamedTuple):
    """The model, its family, how its weights are quantised, and the whole file; `own` where moekit wrote it."""

    config: ModelConfig
    family: Family
    quantisation: Quantisation | None
    data: dict[str, Any]
    own: bool


def describe(folder: Path) -> Description:
    """Read `config.json`. Raises InputError for what is missing, wrong or not understood, naming the key."""
    file = folder / "config.json"
    if not file.is_file():
        hint = "give a folder with config.json and safetensors weights"
        reason = "no config.json in it" if folder.is_dir() else "is no folder" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {reason}", hint)
    data = read_json(file)
    family = family_named(data.get("model_type"), str(file))
    try:
        config = family.from_hub(data)
        return Description(config, family, read_quantisation(data), data, "moekit" in (*data, family.model_type))
    except ConfigError as error:
        raise InputError(f"{file}: {error}", error.hint) from None


def present(found: Description, stored: set[str]) -> ModelConfig:
    """The configuration of what is stored. transformers announces a prediction module and does not write it."""
    config = found.config
    names = {} if found.own else found.family.names(config) or {}
    module = {hub for ours, hub in names.items() if ours.startswith("mtp.") and isinstance(hub, str)}
    return replace(config, mtp_depth=0) if config.mtp_depth and module and not module & stored else config
