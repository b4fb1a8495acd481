"""Write a folder's weights anew in another type or other shards, tensor by tensor."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer

from moekit.checkpoint.description import Description, describe
from moekit.checkpoint.fit import Fit, Source, fitting
from moekit.checkpoint.gguf import DType, write_gguf
from moekit.checkpoint.lazy import Reader
from moekit.checkpoint.load import DTYPES, load_tokenizer, stop_ids, stored_dtype
from moekit.checkpoint.pieces import Piece
from moekit.checkpoint.shards import SHARD_BYTES, Entry, write_shards
from moekit.checkpoint.storage import new_folder, write_json
from moekit.checkpoint.weights import NAMES, TORCH, Weights
from moekit.config.errors import InputError
from moekit.config.quantisation import KEY, SCALE, Fp8Blocks, write_quantisation
from moekit.data.tokenizer import FILE as TOKENIZER
from moekit.model.fp8 import weight_roundings
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor
from moekit.tensors.fp8 import Blocks, quantise_blocks

Dtype = Literal["float32", "bfloat16", "float16", "fp8"]

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "LICENSE*", "NOTICE*"),
)
"""Files beside the weights that go along unchanged."""


def convert(
    source: Path,
    target: Path,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> list[str]:
    """Write the model of the folder `source` into the new folder `target`; returns notes for the user.

    Without `dtype` every tensor stays as it is, bit by bit. "fp8" stores the weights of the products inside the blocks
    in E4M3 with scales for blocks of 128 x 128, as DeepSeek-V3 is released, and the rest in bfloat16; selection biases
    are float32 always. Tensors keep their names. `on_bytes` is told how many bytes of how many are written.

    Raises InputError for a source that is damaged, incomplete or holds numbers that are not finite, and for a target
    that exists; then no target appears.
    """
    found = describe(source)
    if dtype == "fp8" and found.family.model_type == "moekit":
        message = f"{source}: FP8 blocks are a format of the hub's families, and no other program knows this model"
        raise InputError(message, "choose --dtype bfloat16")
    empty, fitted = fitting(source, found)
    _words(source)
    with new_folder(target) as building:
        entries = list(_entries(empty, fitted, found, dtype))
        _check_room(sum(each.bytes for each in entries), building)
        write_shards(entries, building, shard_bytes, on_bytes)
        for pattern in COMPANIONS:
            for file in source.glob(pattern):
                shutil.copyfile(file, building / file.name)
        write_json(building / "config.json", _configuration(found, dtype))
    return []


def convert_to_gguf(source: Path, target: Path, dtype: DType | None = None) -> list[str]:
    """Write the model of the folder `source` into the new file `target`, for llama.cpp; returns notes for the user.

    Matrices are of type `dtype`, without one as they are stored.

    Raises InputError for an architecture that llama.cpp does not know or would compute differently.
    """
    found = describe(source)
    empty, fitted = fitting(source, found)
    reader = Reader(Weights(fitted.contents.tensors), found.quantisation)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    plain = {DTYPES[name]: name for name in get_args(DType)}.get(stored_dtype(fitted), "float32")

    def tensor(name: str) -> Tensor:
        first = fitted.sources[name][0]
        kept = torch.float32 if first.scale is not None else TORCH[first.stored.dtype]
        return reader.tensor(shapes[name], fitted.sources[name], kept, "cpu")

    return write_gguf(empty.config, tensor, target, dtype or plain, *_words(source))


def _words(source: Path) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """The tokenizer, where there is one, and the ids that end a text; what is wrong with them must not be passed on."""
    return load_tokenizer(source) if (source / TOKENIZER).is_file() else None, stop_ids(source)


def _configuration(found: Description, dtype: Dtype | None) -> dict[str, Any]:
    if dtype is None:
        return found.data
    data = {key: value for key, value in found.data.items() if key not in (KEY, "torch_dtype", "dtype")}
    if dtype == "fp8":
        data[KEY] = write_quantisation(found.quantisation or Fp8Blocks())
    return data | {"torch_dtype": "bfloat16" if dtype == "fp8" else dtype}


def _entries(empty: Transformer, fitted: Fit, found: Description, dtype: Dtype | None) -> Iterator[Entry]:
    """What to write: the matrices of a layer's experts one behind the other, then what no tensor of ours comes from."""
    weights = Weights(fitted.contents.tensors)
    reader = Reader(weights, found.quantisation)
    plain = None if dtype is None else torch.bfloat16 if dtype == "fp8" else DTYPES[dtype]
    kept = {name for name, p in empty.named_parameters() if p.dtype == torch.float32 and not p.requires_grad}
    in_blocks = set(weight_roundings(empty)) if dtype == "fp8" else set()
    written = set()
    for ours, sources in fitted.sources.items():
        for each in sources:
            written |= {each.piece.hub, each.piece.hub + SCALE}
            if plain is None or (ours in in_blocks and each.scale is not None):
                yield from _unchanged(each, reader)
            elif ours in in_blocks:
                yield from _in_blocks(each, reader)
            else:
                yield _as(each, reader, torch.float32 if ours in kept else plain)
    for name, stored in weights.tensors.items():
        if name not in written:
            extra = Source(Piece(name, "", ()), stored, None)
            copied = plain is not None and name in found.family.copies(empty.config) and stored.dtype in TORCH
            if copied:
                yield _as(extra, reader, plain or torch.bfloat16)
            else:
                yield from _unchanged(extra, reader)


def _unchanged(source: Source, reader: Reader) -> Iterator[Entry]:
    stored, name = source.stored, source.piece.hub
    yield Entry(name, stored.dtype, stored.shape, lambda: reader.checked(name, stored))
    if (scale := source.scale) is not None:
        yield Entry(name + SCALE, scale.dtype, scale.shape, lambda: reader.checked(name + SCALE, scale))


def _as(source: Source, reader: Reader, dtype: torch.dtype) -> Entry:
    return Entry(source.piece.hub, NAMES[dtype], source.stored.shape, lambda: reader.value(source, dtype).to(dtype))


def _in_blocks(source: Source, reader: Reader) -> Iterator[Entry]:
    """A weight and its scales, which are written one after the other from one quantisation."""
    waiting: list[Blocks] = []

    def values() -> Tensor:
        waiting.append(quantise_blocks(reader.value(source, torch.float32)))
        return waiting[0].values

    name, blocks = source.piece.hub, Fp8Blocks()
    rows, columns = source.stored.shape
    yield Entry(name, "F8_E4M3", source.stored.shape, values)
    shape = (-(-rows // blocks.rows), -(-columns // blocks.columns))
    yield Entry(name + SCALE, "F32", shape, lambda: waiting.pop().scale_inv)


def _check_room(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", "choose another disk"
        )
