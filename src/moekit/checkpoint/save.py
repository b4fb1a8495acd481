"""Write a model folder that transformers and other readers of the hub's format open."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from moekit.checkpoint.pieces import pieces, take
from moekit.config.errors import InputError
from moekit.config.families import family_for
from moekit.config.model import ModelConfig
from moekit.data.tokenizer import end_of_text, save_tokenizer
from moekit.tensors import Tensor

WEIGHTS = "model.safetensors"


def save_model(state: Mapping[str, Tensor], config: ModelConfig, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write weights, `config.json`, tokenizer and `generation_config.json` into `folder`, which must not exist.

    All is written under a temporary name beside it and renamed at the end: a folder by that name is whole.
    """
    with new_folder(folder) as building:
        write_weights(state, config, building / WEIGHTS)
        write_description(config, building, tokenizer)


def write_weights(state: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Write the tensors of `state` under the names of the family of `config`."""
    family = family_for(config)
    tied = {"head.weight"} if config.tie_embeddings else set()
    ours = {name: tensor.detach() for name, tensor in state.items() if name not in tied}
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    hub = {piece.hub: take(ours[piece.ours], piece) for piece in pieces(shapes, family.names(config))}
    hub |= {name: ours[original] for name, original in family.copies(config).items() if original in ours}
    hub |= {name: torch.zeros(shape) for name, shape in family.zeros(config).items()}
    path.touch()
    mode = path.stat().st_mode
    # safetensors refuses tensors that share memory, and views of a stack do.
    save_file({name: tensor.cpu().clone() for name, tensor in hub.items()}, path, metadata={"format": "pt"})
    # It also hides its files from all other users.
    path.chmod(mode)
    flush(path)


def write_description(config: ModelConfig, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write `config.json`, and the tokenizer with what generation needs to know of it."""
    description = family_for(config).to_hub(config)
    assert description is not None
    if tokenizer is not None:
        end = end_of_text(tokenizer)
        special = {"bos_token_id": end, "eos_token_id": end}
        description |= special
        save_tokenizer(tokenizer, folder)
        write_json(folder / "generation_config.json", special)
    write_json(folder / "config.json", description)


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON under a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
    flush(temporary)
    temporary.replace(path)


def flush(path: Path) -> None:
    """Wait until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class new_folder:  # noqa: N801
    """A folder that appears whole or not at all: `with new_folder(path) as building: ...`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.building = path.with_name(f".{path.name}.writing")

    def __enter__(self) -> Path:
        if os.path.lexists(self.path):
            raise InputError(f"{self.path} exists already", "choose another folder")
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir(parents=True)
        return self.building

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.building, ignore_errors=True)
            return
        for entry in self.building.iterdir():
            flush(entry)
        flush(self.building)
        self.building.rename(self.path)
        flush(self.path.parent)
