"""One model in several sizes: the same configuration with one of its numbers varied."""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from moekit.config.codec import overrides, update
from moekit.config.errors import ConfigError, InputError
from moekit.config.families import family_named
from moekit.config.files import read_json
from moekit.config.model import ModelConfig
from moekit.config.moe import split
from moekit.config.presets.load import load_run, preset_names

GRANULARITY = "granularity"
"""The key that splits every expert, instead of setting a field (arXiv 2401.06066, section 3.1)."""

MOST = 16
"""Values of one sweep: more columns are no table."""

LARGEST = 2**24
"""The largest value that is no slip: there are contexts of ten million tokens."""


def config_from(source: str) -> ModelConfig:
    """The configuration of a preset, or of a `config.json` (or its folder) of a family that moekit runs.

    Raises ConfigError for anything else: what moekit can only count has no fields to vary.
    """
    if source in preset_names():
        return load_run(source).model
    file = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if file.suffix != ".json":
        raise ConfigError(
            "sweep", f"{source} has no configuration to vary", "give a preset or a folder with config.json"
        )
    data = read_json(file)
    try:
        return family_named(data.get("model_type"), str(file)).from_hub(data)
    except ConfigError as error:
        raise InputError(f"{file}: {error}", error.hint) from None


def sweep(config: ModelConfig, wanted: str) -> tuple[tuple[str, ModelConfig], ...]:
    """The variants that `wanted` names, such as "n_routed=16,32,64", each with its value as its name.

    All other fields stay: more routed experts of the same width, with the same top_k, are more to store and the same to
    compute. `granularity=1,2,4` splits the experts, which leaves both. Raises ConfigError for a key or a value that
    cannot be.
    """
    key, equals, values = wanted.partition("=")
    key, texts = key.strip().replace("-", "_"), [text.strip() for text in values.split(",")]
    if not equals or not all(texts):
        raise ConfigError("sweep", f"{wanted!r} is no sweep", "write KEY=V1,V2,..., for example n_routed=16,32,64")
    if len(texts) > MOST:
        raise ConfigError("sweep", f"{len(texts)} values, but {MOST} are the most", "sweep in parts")
    if len(set(texts)) < len(texts):
        raise ConfigError("sweep", f"{wanted!r} names a value twice")
    return tuple((text, _variant(config, key, text)) for text in texts)


def _variant(config: ModelConfig, key: str, text: str) -> ModelConfig:
    places = dict(_places(config))
    known = (*([GRANULARITY] if config.moe_layers else []), *places)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
        raise ConfigError("sweep", f"{key!r} is no size of this model", hint)
    if text.lstrip("+-").isdigit() and abs(int(text[:20])) > LARGEST:
        raise ConfigError("sweep", f"{key}={text}: must be at most {LARGEST:,}")
    try:
        if key == GRANULARITY:
            parts = update(_Split(), {"granularity": text}).granularity
            return dataclasses.replace(config, moe=split(config.moe, parts))
        return update(config, overrides([(places[key], text)]))
    except ConfigError as error:
        raise ConfigError("sweep", f"{key}={text}: {error}", error.hint) from None


def _places(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Every whole number of the configuration that is a size: its name, and where it stands."""
    sections = [("", config), ("attention.", config.attention)]
    if config.moe_layers:
        sections += [("moe.", config.moe), ("moe.routing.", config.moe.routing)]
    for prefix, section in sections:
        for name, kind in get_type_hints(type(section)).items():
            # The experts' width is the model's; it has one name here.
            if kind in (int, int | None) and f"{prefix}{name}" != "moe.width":
                yield name, f"{prefix}{name}"


@dataclasses.dataclass(frozen=True, slots=True)
class _Split:
    granularity: int = 1
