"""Find the model to be planned: a preset, a paper's shape, a folder, a `config.json`, an index or a GGUF file."""

import difflib
import math
from pathlib import Path
from typing import Any

from moekit.config.errors import ConfigError, InputError
from moekit.config.families import FAMILIES, Family, family_for, family_named
from moekit.config.files import read_json
from moekit.config.model import ModelConfig
from moekit.config.presets.load import load_run
from moekit.config.presets.load import preset_names as run_presets
from moekit.config.quantisation import Fp8Blocks, Groups, read_quantisation
from moekit.plan.blueprint import Blueprint, Weight
from moekit.plan.families import READERS, read_family
from moekit.plan.from_config import blueprint_of
from moekit.plan.from_gguf import blueprint_of_gguf
from moekit.plan.gguf import is_gguf
from moekit.plan.grouped import in_groups
from moekit.plan.papers import paper, paper_names

RELEASED_IN_FP8 = ("deepseek-v3",)
"""Presets of models whose released weights are FP8 in blocks."""

LONGEST = 16 * 2**20
"""Bytes of a `config.json`, at most; real ones have a few thousand."""

AS_PUBLISHED = "take the config.json that was published with the model"

KINDS = "give a preset, a folder with config.json, a config.json, a *.safetensors.index.json or a *.gguf"


def preset_names() -> list[str]:
    """All names that `blueprint_from` knows: the presets, and the shapes of papers."""
    return sorted({*run_presets(), *paper_names()})


def blueprint_from(source: str) -> Blueprint:
    """The shape of the model that `source` names. Weights are not read.

    Raises InputError for what is neither a known name nor a file that says what model it is, and for a model whose
    `config.json` has a field that is not understood.
    """
    if source in run_presets():
        return _preset(source)
    if source in paper_names():
        return paper(source)
    path = Path(source)
    if not source:
        raise InputError("no model is named", KINDS)
    try:
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return _file(path)
        exists = path.exists()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})", KINDS) from None
    if exists:
        raise InputError(f"{source}: is neither a file nor a folder", KINDS)
    near = difflib.get_close_matches(source, preset_names(), 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(preset_names())}"
    raise InputError(f"no preset, file or folder is called {source}", hint)


def _preset(name: str) -> Blueprint:
    config = load_run(name).model
    stored = "fp8" if name in RELEASED_IN_FP8 else None
    return blueprint_of(config, name, family_for(config).model_type, stored)


def _folder(path: Path) -> Blueprint:
    config = path / "config.json"
    if config.is_file():
        return _config_file(config)
    files = sorted(path.glob("*.gguf"))
    hint = f"give the file itself: {files[0]}" if files else "a model's folder as downloaded from the hub has one"
    raise InputError(f"{path}: holds no config.json", hint)


def _file(path: Path) -> Blueprint:
    if is_gguf(path):
        return blueprint_of_gguf(path)
    if path.name.endswith((".safetensors.index.json", ".safetensors")):
        config = path.with_name("config.json")
        if not config.is_file():
            raise InputError(
                f"{path}: there is no config.json beside it", "put the model's config.json into the folder"
            )
        return _config_file(config)
    if path.suffix == ".json":
        return _config_file(path)
    if path.suffix == ".gguf":
        raise InputError(f"{path}: is no GGUF file", "its first four bytes are not GGUF; copy or download it again")
    raise InputError(f"{path}: is no file that describes a model", KINDS)


def _config_file(path: Path) -> Blueprint:
    size = path.stat().st_size
    if size > LONGEST:
        raise InputError(f"{path}: has {size:,} bytes, which no config.json has", KINDS)
    name = path.resolve().parent.name or path.name
    try:
        return _described(read_json(path), name, path)
    except ConfigError as error:
        raise InputError(f"{path}: {error}", error.hint or AS_PUBLISHED) from None
    except InputError as error:
        raise InputError(str(error), error.hint or AS_PUBLISHED) from None


def _idle(family: Family, config: ModelConfig) -> list[Weight]:
    """Tensors that the family's files hold and that compute nothing in this model."""
    return [
        Weight("router" if "correction" in name else "shared", name, shape, 1, 0, "vector", False)
        for name, shape in family.zeros(config).items()
        if math.prod(shape)
    ]


def _described(data: dict[str, Any], name: str, path: Path) -> Blueprint:
    model_type = data.get("model_type")
    if model_type is None and "weight_map" in data:
        raise InputError(f"{path}: is an index of weights, no config.json", "call it *.safetensors.index.json")
    if isinstance(model_type, str) and model_type in READERS:
        return read_family(data, name)
    if model_type not in [family.model_type for family in FAMILIES]:
        known = ", ".join(sorted([*(family.model_type for family in FAMILIES), *READERS]))
        raise InputError(f"{path}: model_type {model_type!r} is not supported", f"supported: {known}")
    family = family_named(model_type, str(path))
    stored = read_quantisation(data)
    config = family.from_hub(data)
    found = blueprint_of(config, name, family.model_type, "fp8" if isinstance(stored, Fp8Blocks) else None)
    found = found._replace(weights=(*found.weights, *_idle(family, config)))
    if isinstance(stored, Groups):
        return in_groups(found, stored)
    if stored in (None, Fp8Blocks()):
        return found
    note = f"the file's FP8 blocks are {stored.rows} x {stored.columns}; scales are counted for 128 x 128"
    return found._replace(notes=(note,))
