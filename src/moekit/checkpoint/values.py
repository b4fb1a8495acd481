"""Whether stored numbers are finite, from the bits of their exponents; plain reads in bounded memory, without torch."""

import errno
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from moekit.checkpoint.header import ITEM_BYTES, Stored
from moekit.config.errors import InputError

NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
"""The bits that are all set in numbers which are not finite: the exponent's, and with E4M3, which has no infinity, the
mantissa's too."""

CHUNK = 1 << 24
"""Bytes read at once."""


class Extent(NamedTuple):
    """Bytes from `start` up to `stop` of a file that are stored; what lies between extents reads as zeros."""

    start: int
    stop: int


def data_bytes(files: Iterable[Path]) -> int:
    """Bytes that the files hold outside their holes."""
    total = 0
    for file in files:
        with _opened(file) as opened:
            total += sum(extent.stop - extent.start for extent in _extents(opened))
    return total


def not_finite(tensors: Mapping[str, Stored]) -> list[str]:
    """The names of those tensors that hold numbers which are not finite. Types without such numbers are not read."""
    found = []
    for file, group in groupby(tensors.items(), key=lambda item: item[1].file):
        with _opened(file) as opened:
            extents = list(_extents(opened))
            for name, stored in group:
                if stored.dtype in NOT_FINITE and not _finite(opened, stored, extents):
                    found.append(name)
    return found


def all_zero(stored: Stored) -> bool:
    """Whether every byte of the tensor is zero."""
    with _opened(stored.file) as opened:
        parts = _parts(stored, list(_extents(opened)))
        return not any(chunk.any() for part in parts for chunk in _chunks(opened, part))


def _opened(file: Path) -> FileIO:
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def _extents(opened: FileIO) -> Iterator[Extent]:
    """Where the file is stored, in order: all of it where the system does not tell."""
    descriptor, stop = opened.fileno(), 0
    size = os.fstat(descriptor).st_size
    while stop < size:
        try:
            start = os.lseek(descriptor, stop, os.SEEK_DATA)
            stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, stop = stop, size
        yield Extent(start, stop)


def _finite(opened: FileIO, stored: Stored, extents: list[Extent]) -> bool:
    kind, bits = NOT_FINITE[stored.dtype]
    for part in _parts(stored, extents):
        for chunk in _chunks(opened, part):
            numbers = chunk.view(kind)
            numbers &= kind(bits)
            if numbers.max() == bits:
                return False
    return True


def _parts(stored: Stored, extents: list[Extent]) -> Iterator[Extent]:
    """The whole numbers of a tensor that lie in extents, even by one byte."""
    size = ITEM_BYTES[stored.dtype]
    done = stored.start
    first = bisect_right(extents, stored.start, key=lambda extent: extent.stop)
    for extent in extents[first:]:
        if extent.start >= stored.stop:
            return
        start = max(done, extent.start - (extent.start - stored.start) % size)
        done = min(stored.stop, extent.stop + (stored.start - extent.stop) % size)
        if start < done:
            yield Extent(start, done)


def _chunks(opened: FileIO, part: Extent) -> Iterator[UInt8[np.ndarray, " bytes"]]:
    """The bytes of a part, at most CHUNK at once."""
    opened.seek(part.start)
    for place in range(part.start, part.stop, CHUNK):
        chunk = np.empty(min(CHUNK, part.stop - place), np.uint8)
        filled = memoryview(chunk)  # type: ignore[arg-type]
        while filled:
            read = opened.readinto(filled)
            if not read:
                raise InputError(f"{opened.name}: ended while it was read", "leave the files alone meanwhile")
            filled = filled[read:]
        yield chunk
