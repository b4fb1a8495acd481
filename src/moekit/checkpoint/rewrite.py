"""A model folder written anew, tensor by tensor: its weights in other types, all else as it was."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from moekit.checkpoint.description import Description
from moekit.checkpoint.fit import Fit, Source
from moekit.checkpoint.lazy import Reader
from moekit.checkpoint.load import load_tokenizer, stop_ids
from moekit.checkpoint.pieces import Piece
from moekit.checkpoint.shards import Entry, write_shards
from moekit.checkpoint.storage import new_folder, write_json
from moekit.checkpoint.weights import NAMES
from moekit.config.errors import InputError
from moekit.config.quantisation import SCALE
from moekit.data.tokenizer import FILE as TOKENIZER

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "LICENSE*", "NOTICE*"),
)
"""Files beside the weights that go along unchanged."""

OnBytes = Callable[[int, int], None]
"""Hears how many bytes of how many are written."""


def rewrite(
    source: Path,
    target: Path,
    entries: Sequence[Entry],
    configuration: dict[str, Any],
    shard_bytes: int,
    on_bytes: OnBytes,
) -> None:
    """Write the new folder `target`: the tensors of `entries`, `config.json`, and what lies beside them in `source`.

    Raises InputError where there is no room, or `target` exists; then no target appears.
    """
    with new_folder(target) as building:
        _check_room(sum(each.bytes for each in entries), building)
        write_shards(entries, building, shard_bytes, on_bytes)
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                shutil.copyfile(file, building / file.name)
        write_json(building / "config.json", configuration)


def words(source: Path) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """The tokenizer, where there is one, and the ids that end a text; what is wrong with them must not be passed on."""
    return load_tokenizer(source) if (source / TOKENIZER).is_file() else None, stop_ids(source)


def unchanged(source: Source, reader: Reader) -> Iterator[Entry]:
    """A tensor as it is stored, and its scales."""
    stored, name = source.stored, source.piece.hub
    yield Entry(name, stored.dtype, stored.shape, lambda: reader.checked(name, stored))
    if (scale := source.scale) is not None:
        yield Entry(name + SCALE, scale.dtype, scale.shape, lambda: reader.checked(name + SCALE, scale))


def in_type(source: Source, reader: Reader, dtype: torch.dtype) -> Entry:
    """What a tensor means, in `dtype`."""
    return Entry(source.piece.hub, NAMES[dtype], source.shape, lambda: reader.value(source, dtype).to(dtype))


def further(found: Description, fitted: Fit) -> Iterator[Source]:
    """The stored tensors that no tensor of ours comes from: those that repeat one of ours name it."""
    assert fitted.model is not None
    own = [source.piece.hub for sources in fitted.sources.values() for source in sources]
    known, copies = {*own, *(name + SCALE for name in own)}, found.family.copies(fitted.model.config)
    shapes = {name: tuple(parameter.shape) for name, parameter in fitted.model.named_parameters()}
    for name, stored in fitted.contents.tensors.items():
        if name not in known:
            ours = copies.get(name, "")
            yield Source(Piece(name, ours, ()), stored, None, shapes.get(ours, stored.shape))


def _check_room(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", "choose another disk"
        )
