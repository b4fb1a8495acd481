"""Write tensors one by one into safetensors shards, so that no more than one of them need be in memory."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moekit.checkpoint.folder import INDEX, WEIGHTS
from moekit.checkpoint.header import ITEM_BYTES, write_header
from moekit.checkpoint.storage import flush, write_json
from moekit.checkpoint.weights import NAMES
from moekit.tensors import Tensor

SHARD_BYTES = 5_000_000_000
"""The hub's usual size of a shard."""

AT_ONCE = 32 << 20
"""Bytes that are handed to the system at once: where files can have huge pages, it keeps what comes in such pieces in
them, and whoever maps the file then reads a quarter faster."""


class Entry(NamedTuple):
    """A tensor to write: its name, its type in the words of the format, its shape, and how to get it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * ITEM_BYTES[self.dtype]


def entry(name: str, tensor: Tensor) -> Entry:
    """A tensor that is in memory."""
    return Entry(name, NAMES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def write_shards(
    entries: Sequence[Entry],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> None:
    """Write all entries, in their order, into shards of at most `shard_bytes` (a larger tensor has its own).

    Where there are several, the index follows. `on_bytes` is told how many bytes of how many are written.
    """
    shards = split(entries, shard_bytes)
    total, done = sum(each.bytes for each in entries), 0
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for size in write_file(shard, folder / name):
            done += size
            on_bytes(done, total)
        weight_map |= {each.name: name for each in shard}
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def split(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """The entries in order, as few bytes over the limit as their sizes allow."""
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for each in entries:
        if shards[-1] and each.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(each)
        room -= each.bytes
    return shards


def write_file(entries: Sequence[Entry], path: Path) -> Iterator[int]:
    """Write one file and wait until it is on disk; yields the bytes of each tensor when it is written."""
    with path.open("wb", buffering=AT_ONCE) as file:
        file.write(write_header((each.name, each.dtype, each.shape) for each in entries))
        for each in entries:
            tensor = each.tensor().detach().cpu()
            if tensor.numel():
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            yield each.bytes
    flush(path)
