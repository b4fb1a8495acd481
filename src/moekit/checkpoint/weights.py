"""Tensors of a checkpoint as views of memory-mapped files: their bytes come from disk when they are first touched."""

import mmap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from moekit.checkpoint.header import Stored
from moekit.config.errors import InputError
from moekit.tensors import Tensor
from moekit.tensors.memory import map_huge_pages, memory_bytes

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
"""The types weights are stored in; U8 are the bytes of quantised rows."""

NAMES = {dtype: name for name, dtype in TORCH.items()}

WINDOW = 1 << 32
"""Bytes mapped at once. The kernel refuses private mappings larger than the machine's memory."""


class Window(NamedTuple):
    """Bytes from `start` up to `stop` of a file, and their mapping; it begins at a page."""

    start: int
    stop: int
    memory: mmap.mmap


class Weights:
    """Reads tensors. Nothing is copied: writing to a view changes memory of its own, never the file.

    All files are mapped at once, so that they may be deleted or replaced while in use, though not overwritten.
    """

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self.tensors = tensors
        spans: dict[Path, list[tuple[int, int]]] = {}
        for stored in tensors.values():
            found = spans.setdefault(stored.file, [])
            if found and stored.stop - found[-1][0] <= WINDOW:
                found[-1] = (found[-1][0], stored.stop)
            else:
                found.append((stored.start, stored.stop))
        self._windows = {file: [_window(file, *span) for span in found] for file, found in spans.items()}
        windows = [window for found in self._windows.values() for window in found]
        # A huge page brings along what lies beside a tensor: right where all of it has room.
        has_room = sum(window.stop - window.start for window in windows) < memory_bytes()
        self._huge = has_room and map_huge_pages([window.memory for window in windows])

    def read(self, stored: Stored) -> Tensor:
        """The tensor as it is stored."""
        found = self.joined([stored])
        assert found is not None
        return found.view(stored.shape)

    def joined(self, parts: Sequence[Stored]) -> Tensor | None:
        """The numbers of several tensors as one vector, where they follow each other in a file; else None."""
        first, last = parts[0], parts[-1]
        for before, after in pairwise(parts):
            if (before.file, before.stop, before.dtype) != (after.file, after.start, after.dtype):
                return None
        count = sum(part.numel for part in parts)
        if not count:
            return torch.empty(0, dtype=TORCH[first.dtype])
        window = next(each for each in self._windows[first.file] if first.start < each.stop)
        if last.stop > window.stop:
            return None
        begin = first.start - window.start
        page = begin % mmap.ALLOCATIONGRANULARITY
        if not self._huge:
            window.memory.madvise(mmap.MADV_WILLNEED, begin - page, last.stop - first.start + page)
        return torch.frombuffer(window.memory, dtype=TORCH[first.dtype], count=count, offset=begin)


def _window(path: Path, start: int, stop: int) -> Window:
    page = start % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            # A mapping of nothing cannot be had; a window without bytes is never read.
            size = max(stop - start + page, 1)
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=start - page)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be mapped into memory ({error})") from None
    return Window(start - page, stop, memory)


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; reads them at memory speed. Whole numbers always are."""
    if not tensor.numel() or not (tensor.dtype.is_floating_point):
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return bool((tensor.view(torch.uint8) & 0x7F).amax() < 0x7F)
    least, most = tensor.aminmax()
    return bool(least.isfinite() & most.isfinite())
