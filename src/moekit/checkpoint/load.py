"""Open a model folder: configuration, weights, tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from moekit.checkpoint.pieces import Piece, pieces, take
from moekit.checkpoint.save import WEIGHTS
from moekit.config.errors import ConfigError, InputError
from moekit.config.families import Family, family_named
from moekit.config.model import ModelConfig
from moekit.data import tokenizer as tokenizers
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(path: str | Path, dtype: torch.dtype | str | None = None, device: str = "cpu") -> Transformer:
    """The model in the folder `path`, ready for evaluation.

    `dtype` converts the weights (None: as they are stored); selection biases stay float32. Raises InputError for a
    folder that is missing, incomplete, or of a kind moekit does not know.
    """
    folder = Path(path)
    config, family = _described(folder)
    with torch.device("meta"):
        model = Transformer(config)
    with _opened(_weights(folder)) as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        parts = _check_names(model, family, stored, folder)
        wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
        model = model.to(wanted or _dtype(file, parts)).to_empty(device=device)
        _fill(model, parts, file)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def load_config(path: str | Path) -> ModelConfig:
    """The configuration in the folder `path`."""
    return _described(Path(path))[0]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the folder `path`, or the `tokenizer.json` it names."""
    return tokenizers.load_tokenizer(Path(path))


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a text, from `generation_config.json` or `config.json`; none where neither says."""
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds no JSON object")
    return data


def _described(folder: Path) -> tuple[ModelConfig, Family]:
    file = folder / "config.json"
    if not file.is_file():
        hint = "give a folder with config.json and safetensors weights"
        raise InputError(f"{folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}", hint)
    data = read_json(file)
    family = family_named(data.get("model_type"), str(file))
    try:
        return family.from_hub(data), family
    except ConfigError as error:
        raise InputError(f"{file}: {error}", error.hint) from None


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


def _check_names(
    model: Transformer, family: Family, stored: dict[str, tuple[int, ...]], folder: Path
) -> dict[str, Piece]:
    """The pieces to read, by their name in the file. Nothing may be missing, unexpected or of another shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        shapes.pop("head.weight", None)
    wanted = {piece.hub: piece for piece in pieces(shapes, family.names(model.config))}
    copies = family.copies(model.config).keys() | ({"lm_head.weight"} if model.config.tie_embeddings else set())
    for problem, names in (
        ("missing", wanted.keys() - stored.keys()),
        ("unexpected", stored.keys() - wanted.keys() - copies),
    ):
        if names:
            raise InputError(f"{folder / WEIGHTS}: {len(names)} {problem} tensors, among them {sorted(names)[0]}")
    for name, piece in wanted.items():
        expected = tuple(take(torch.empty(shapes[piece.ours], device="meta"), piece).shape)
        if stored[name] != expected:
            raise InputError(f"{folder / WEIGHTS}: {name} is {list(stored[name])}, config.json wants {list(expected)}")
    return wanted


def _dtype(file: Any, parts: dict[str, Piece]) -> torch.dtype:
    """The type of the embedding stands for the model's."""
    name = next(name for name, piece in parts.items() if piece.ours == "embedding.weight")
    return file.get_slice(name)[:1].dtype


@torch.no_grad()
def _fill(model: Transformer, parts: dict[str, Piece], file: Any) -> None:
    tensors: dict[str, Tensor] = model.state_dict()
    for name, piece in parts.items():
        take(tensors[piece.ours], piece).copy_(file.get_tensor(name))
