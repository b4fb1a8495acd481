"""Write a model folder that transformers and other readers of the hub's format open."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer

from moekit.checkpoint.groups import groups_of
from moekit.checkpoint.pieces import pieces, take
from moekit.checkpoint.shards import SHARD_BYTES, Entry, entry, write_file, write_shards
from moekit.checkpoint.storage import new_folder, write_json
from moekit.config.families import Family, family_for
from moekit.config.model import ModelConfig
from moekit.config.quantisation import KEY, Groups, write_quantisation
from moekit.data.tokenizer import end_of_text, save_tokenizer
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor


def save(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `model` into the new folder `path`, in the dtype of its weights; selection biases stay float32.

    The folder holds safetensors shards of at most `shard_bytes` under the hub's names, `config.json`, and the tokenizer
    with `generation_config.json` where one is given. Raises InputError if `path` exists.
    """
    own = model.model_type, groups_of(model)
    save_model(model.state_dict(), model.config, Path(path), tokenizer, shard_bytes, *own)


def save_model(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    shard_bytes: int = SHARD_BYTES,
    model_type: str | None = None,
    groups: Groups | None = None,
) -> None:
    """As `save`, for a model's tensors by name; `model_type` is preferred where several families express the model.
    `groups` tells how its bytes (uint8) are quantised weights.

    All is written under a temporary name beside it and renamed at the end: a folder by that name is whole.
    """
    with new_folder(folder) as building:
        family = family_for(config, model_type)
        write_shards(list(entries(state, config, family)), building, shard_bytes)
        write_description(config, building, tokenizer, family, state["embedding.weight"].dtype, groups)


def write_weights(state: Mapping[str, Tensor], config: ModelConfig, path: Path) -> None:
    """Write the tensors of `state` under the names of the family of `config` into one file."""
    for _ in write_file(list(entries(state, config, family_for(config))), path):
        pass


def entries(state: Mapping[str, Tensor], config: ModelConfig, family: Family) -> Iterator[Entry]:
    """The hub's tensors of a model. A layer's experts follow each other, so that they can be mapped as a stack."""
    tied = {"head.weight"} if config.tie_embeddings else set()
    ours = {name: tensor.detach() for name, tensor in state.items() if name not in tied}
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    for piece in pieces(shapes, family.names(config)):
        yield entry(piece.hub, take(ours[piece.ours], piece))
    for name, original in family.copies(config).items():
        if original in ours:
            yield entry(name, ours[original])
    for name, shape in family.zeros(config).items():
        yield entry(name, torch.zeros(shape))


def write_description(
    config: ModelConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
    groups: Groups | None = None,
) -> None:
    """Write `config.json`, and the tokenizer with what generation needs to know of it."""
    description = (family or family_for(config)).to_hub(config)
    assert description is not None
    if dtype is not None:
        description["dtype"] = str(dtype).removeprefix("torch.")
    if groups is not None:
        description[KEY] = write_quantisation(groups)
    if tokenizer is not None:
        end = end_of_text(tokenizer)
        special = {"bos_token_id": end, "eos_token_id": end}
        description |= special
        save_tokenizer(tokenizer, folder)
        write_json(folder / "generation_config.json", special)
    write_json(folder / "config.json", description)
