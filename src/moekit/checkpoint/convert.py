"""Write a folder's weights anew in another type or other shards, tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from moekit.checkpoint.description import Description, describe
from moekit.checkpoint.fit import Fit, Source, fitting
from moekit.checkpoint.gguf import DType, write_gguf
from moekit.checkpoint.lazy import Reader
from moekit.checkpoint.load import DTYPES, stored_dtype
from moekit.checkpoint.rewrite import OnBytes, further, in_type, rewrite, unchanged, words
from moekit.checkpoint.shards import SHARD_BYTES, Entry
from moekit.checkpoint.weights import TORCH, Weights
from moekit.config.errors import InputError
from moekit.config.quantisation import KEY, SCALE, Fp8Blocks, write_quantisation
from moekit.model.fp8 import weight_roundings
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor
from moekit.tensors.fp8 import Blocks, quantise_blocks

Dtype = Literal["float32", "bfloat16", "float16", "fp8"]


def convert(
    source: Path,
    target: Path,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda done, total: None,  # noqa: ARG005
) -> list[str]:
    """Write the model of the folder `source` into the new folder `target`; returns notes for the user.

    Without `dtype` every tensor stays as it is, bit by bit. "fp8" stores the weights of the products inside the blocks
    in E4M3 with scales for blocks of 128 x 128, as DeepSeek-V3 is released, and the rest in bfloat16; selection biases
    are float32 always. Quantised weights are restored in any type. Tensors keep their names. `on_bytes` is told how
    many bytes of how many are written.

    Raises InputError for a source that is damaged, incomplete or holds numbers that are not finite, and for a target
    that exists; then no target appears.
    """
    found = describe(source)
    if dtype == "fp8" and found.family.model_type == "moekit":
        message = f"{source}: FP8 blocks are a format of the hub's families, and no other program knows this model"
        raise InputError(message, "choose --dtype bfloat16")
    empty, fitted = fitting(source, found)
    words(source)
    entries = list(_entries(empty, fitted, found, dtype))
    rewrite(source, target, entries, _configuration(found, dtype), shard_bytes, on_bytes)
    return []


def convert_to_gguf(source: Path, target: Path, dtype: DType | None = None) -> list[str]:
    """Write the model of the folder `source` into the new file `target`, for llama.cpp; returns notes for the user.

    Matrices are of type `dtype`, without one as they are stored; quantised ones are restored.

    Raises InputError for an architecture that llama.cpp does not know or would compute differently.
    """
    found = describe(source)
    empty, fitted = fitting(source, found)
    reader = Reader(Weights(fitted.contents.tensors), found.quantisation)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    plain = {DTYPES[name]: name for name in get_args(DType)}.get(stored_dtype(fitted), "float32")

    def tensor(name: str) -> Tensor:
        first = fitted.sources[name][0]
        quantised = first.grouped or first.scale is not None
        kept = torch.float32 if quantised else TORCH[first.stored.dtype]
        return reader.tensor(shapes[name], fitted.sources[name], kept, "cpu")

    return write_gguf(empty.config, tensor, target, dtype or plain, *words(source))


def _configuration(found: Description, dtype: Dtype | None) -> dict[str, Any]:
    if dtype is None:
        return found.data
    data = {key: value for key, value in found.data.items() if key not in (KEY, "torch_dtype", "dtype")}
    if dtype == "fp8":
        blocks = found.quantisation if isinstance(found.quantisation, Fp8Blocks) else Fp8Blocks()
        data[KEY] = write_quantisation(blocks)
    return data | {"torch_dtype": "bfloat16" if dtype == "fp8" else dtype}


def _entries(empty: Transformer, fitted: Fit, found: Description, dtype: Dtype | None) -> Iterator[Entry]:
    """What to write: the matrices of a layer's experts one behind the other, then what no tensor of ours comes from."""
    reader = Reader(Weights(fitted.contents.tensors), found.quantisation)
    plain = None if dtype is None else torch.bfloat16 if dtype == "fp8" else DTYPES[dtype]
    kept = {name for name, p in empty.named_parameters() if p.dtype == torch.float32 and not p.requires_grad}
    in_blocks = set(weight_roundings(empty)) if dtype == "fp8" else set()
    for ours, sources in fitted.sources.items():
        for each in sources:
            if plain is None or (ours in in_blocks and each.scale is not None):
                yield from unchanged(each, reader)
            elif ours in in_blocks:
                yield from _in_blocks(each, reader)
            else:
                yield in_type(each, reader, torch.float32 if ours in kept else plain)
    for extra in further(found, fitted):
        if plain is not None and extra.piece.ours and extra.stored.dtype in TORCH:
            yield in_type(extra, reader, plain)
        else:
            yield from unchanged(extra, reader)


def _in_blocks(source: Source, reader: Reader) -> Iterator[Entry]:
    """A weight and its scales, which are written one after the other from one quantisation."""
    waiting: list[Blocks] = []

    def values() -> Tensor:
        waiting.append(quantise_blocks(reader.value(source, torch.float32)))
        return waiting[0].values

    name, blocks = source.piece.hub, Fp8Blocks()
    rows, columns = source.shape
    yield Entry(name, "F8_E4M3", source.shape, values)
    shape = (-(-rows // blocks.rows), -(-columns // blocks.columns))
    yield Entry(name + SCALE, "F32", shape, lambda: waiting.pop().scale_inv)
