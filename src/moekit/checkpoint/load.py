"""Open a model folder: configuration, weights, tokenizer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from moekit.checkpoint.pieces import Piece, pieces, take
from moekit.checkpoint.save import WEIGHTS
from moekit.config.errors import ConfigError, InputError
from moekit.config.families import Family, family_named
from moekit.config.files import read_json
from moekit.config.model import ModelConfig
from moekit.data import tokenizer as tokenizers
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Types of tensors that hold weights as they are; others need scales."""


class Described(NamedTuple):
    """What `config.json` says; `own` where moekit wrote it."""

    config: ModelConfig
    family: Family
    own: bool


def load(path: str | Path, dtype: torch.dtype | str | None = None, device: str = "cpu") -> Transformer:
    """The model in the folder `path`, ready for evaluation.

    `dtype` converts the weights (None: as they are stored); selection biases stay float32. Raises InputError for a
    folder that is missing, incomplete, or of a kind moekit does not know.
    """
    folder = Path(path)
    described = _described(folder)
    with _opened(_weights(folder)) as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        config, family = _present(described, stored), described.family
        model = _empty(config, folder, stored)
        parts = _check_names(model, family, stored, folder)
        wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
        model = model.to(wanted or _dtype(stored, parts)).to_empty(device=device)
        _fill(model, parts, file)
        _check_zeros(family.zeros(config), stored, folder)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def load_config(path: str | Path) -> ModelConfig:
    """The configuration in the folder `path`."""
    return _described(Path(path)).config


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the folder `path`, or the `tokenizer.json` it names."""
    return tokenizers.load_tokenizer(Path(path))


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a text, from `generation_config.json` or `config.json`; none where neither says."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        found = read_json(file).get("eos_token_id") if file.is_file() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(number) is int for number in ids):
                raise InputError(f"{file}: `eos_token_id`: {found!r} is no token id")
            return tuple(ids)
    return ()


def _described(folder: Path) -> Described:
    file = folder / "config.json"
    if not file.is_file():
        hint = "give a folder with config.json and safetensors weights"
        raise InputError(f"{folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}", hint)
    data = read_json(file)
    family = family_named(data.get("model_type"), str(file))
    try:
        return Described(family.from_hub(data), family, "moekit" in (*data, family.model_type))
    except ConfigError as error:
        raise InputError(f"{file}: {error}", error.hint) from None


def _present(described: Described, stored: dict[str, Any]) -> ModelConfig:
    """The configuration of what is stored. transformers announces a prediction module and does not write it."""
    config, family, own = described
    names = {} if own else family.names(config) or {}
    module = {hub for ours, hub in names.items() if ours.startswith("mtp.") and isinstance(hub, str)}
    return replace(config, mtp_depth=0) if config.mtp_depth and module and not module & stored.keys() else config


def _empty(config: ModelConfig, folder: Path, stored: dict[str, Any]) -> Transformer:
    """The model without memory for its weights."""
    # Each layer has tensors; a damaged number must not keep us busy for hours.
    if config.n_layers > len(stored):
        raise InputError(f"{folder}: config.json wants {config.n_layers} layers, {WEIGHTS} holds {len(stored)} tensors")
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder / 'config.json'}: describes a model that cannot be: {reason}") from None


def _weights(folder: Path) -> Path:
    file = folder / WEIGHTS
    if file.is_file():
        return file
    if (folder / f"{WEIGHTS}.index.json").is_file():
        raise InputError(f"{folder}: weights in several shards are not supported yet")
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickled:
        hint = "convert it to safetensors in a safe place"
        raise InputError(f"{pickled[0]}: pickled weights can run code and are not opened", hint)
    raise InputError(f"{folder}: no {WEIGHTS} in it")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or no safetensors file: {error}") from None


def _check_names(model: Transformer, family: Family, stored: dict[str, Any], folder: Path) -> dict[str, Piece]:
    """The pieces to read, by their name in the file. Nothing may be missing, unexpected or of another shape or type."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        shapes.pop("head.weight", None)
    # One more than there are shows that some are missing; a damaged number must not keep us busy for hours.
    found = islice(pieces(shapes, family.names(model.config)), len(stored) + 1)
    wanted = {piece.hub: piece for piece in found}
    extra = family.copies(model.config).keys() | family.zeros(model.config).keys()
    extra |= {"lm_head.weight"} if model.config.tie_embeddings else set()
    for problem, names in (
        ("missing", wanted.keys() - stored.keys()),
        ("unexpected", stored.keys() - wanted.keys() - extra),
    ):
        if names:
            raise InputError(f"{folder / WEIGHTS}: {len(names)} {problem} tensors, among them {sorted(names)[0]}")
    for name, piece in wanted.items():
        expected = tuple(take(torch.empty(shapes[piece.ours], device="meta"), piece).shape)
        shape, dtype = stored[name].get_shape(), stored[name].get_dtype()
        if tuple(shape) != expected:
            raise InputError(f"{folder / WEIGHTS}: {name} is {list(shape)}, config.json wants {list(expected)}")
        if dtype not in STORED:
            raise InputError(f"{folder / WEIGHTS}: {name} is of type {dtype}, not one of {', '.join(STORED)}")
    return wanted


def _check_zeros(zeros: Mapping[str, tuple[int, ...]], stored: dict[str, Any], folder: Path) -> None:
    """What stands in the file only because others want it must have no effect."""
    for name in zeros.keys() & stored.keys():
        if 0 not in stored[name].get_shape() and stored[name][:].any():
            raise InputError(f"{folder / WEIGHTS}: {name} is not zero, but config.json has no use for it")


def _dtype(stored: dict[str, Any], parts: dict[str, Piece]) -> torch.dtype:
    """The type of the embedding stands for the model's."""
    name = next(name for name, piece in parts.items() if piece.ours == "embedding.weight")
    return STORED[stored[name].get_dtype()]


@torch.no_grad()
def _fill(model: Transformer, parts: dict[str, Piece], file: Any) -> None:
    tensors: dict[str, Tensor] = model.state_dict()
    for name, piece in parts.items():
        take(tensors[piece.ours], piece).copy_(file.get_tensor(name))
