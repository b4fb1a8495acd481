"""The header of a safetensors file: where each tensor lies, read strictly and without torch, and written."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moekit.config.errors import InputError

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of a number of each type the format has."""

LONGEST = 100_000_000
"""Bytes of a header, at most, by the format's own rule."""

ALIGNMENT = 64
"""Our files begin their data at a multiple of a cache line."""


class Stored(NamedTuple):
    """A tensor in a file: its type, its shape, and its bytes from `start` up to `stop`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, Stored]:
    """Where the tensors of `file` lie, in the order of their bytes. Raises InputError unless they fill it exactly."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST):
                raise _damaged(file, f"its header should end at byte {8 + length}, the file at {size}")
            text = opened.read(length)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in _entries(file, text).items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(ordered, file, 8 + length, size)
    return ordered


def write_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file that holds tensors of these names, types and shapes, one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, dtype, shape in tensors:
        end = place + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _damaged(file: Path, what: str) -> InputError:
    return InputError(f"{file}: damaged or no safetensors file: {what}", "copy or download it again")


def _entries(file: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
        return found

    try:
        entries = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header cannot be read ({error})") from None
    if not isinstance(entries, dict):
        raise _damaged(file, "its header holds no JSON object")
    entries.pop("__metadata__", None)
    return entries


def _stored(file: Path, name: str, entry: Any, begin: int) -> Stored:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _damaged(file, f"the entry of {name} in its header lacks a type, a shape or a place") from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(file, f"{name} is of type {dtype!r}, which is not known")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise _damaged(file, f"{name} has the shape {list(shape)} at {[start, stop]}")
    found = Stored(file, dtype, shape, begin + start, begin + stop)
    if stop - start != found.numel * ITEM_BYTES[dtype]:
        raise _damaged(file, f"{name} is {dtype} {list(shape)}, which {stop - start} bytes cannot be")
    return found


def _check_cover(tensors: dict[str, Stored], file: Path, begin: int, size: int) -> None:
    place = begin
    for name, stored in tensors.items():
        if stored.start != place:
            raise _damaged(
                file, f"{name} {'overlaps' if stored.start < place else 'lies apart from'} what is before it"
            )
        place = stored.stop
    if place != size:
        raise _damaged(file, f"its tensors end at byte {place}, the file at {size}")
