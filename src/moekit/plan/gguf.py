"""The header of a GGUF file: its metadata and what tensors it holds, read without its weights and without a package."""

import math
import mmap
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from moekit.config.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

SHORTEST = 24
"""Bytes of the magic, the version and the two counts."""

AGAIN = "copy or download it again"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter for each scalar type of the metadata."""

STRING, ARRAY = 8, 9

MOST_FIELDS, MOST_TENSORS, MOST_STRINGS, MOST_DIMENSIONS, KEPT = 100_000, 1_000_000, 4_000_000, 4, 4096
"""Beyond these counts a header is damaged, not large; of a list, no more than KEPT numbers are kept."""

TYPES = {
    0: ("float32", 1, 4),
    1: ("float16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("int8", 1, 1),
    25: ("int16", 1, 2),
    26: ("int32", 1, 4),
    27: ("int64", 1, 8),
    28: ("float64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("bfloat16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""ggml's types: name, numbers in a block, bytes of a block."""


class Tensor(NamedTuple):
    """A tensor of the file, its shape rows first."""

    shape: tuple[int, ...]
    type: int

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int | None:
        """Bytes it takes, or None for a type not known here."""
        if self.type not in TYPES:
            return None
        _, numbers, size = TYPES[self.type]
        return self.numel // numbers * size

    @property
    def type_name(self) -> str:
        """The type's name, as ggml's or, where there is one, as ours."""
        return TYPES[self.type][0] if self.type in TYPES else f"ggml type {self.type}"


class Header(NamedTuple):
    """Metadata without long lists, and all tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def bytes(self) -> int | None:
        """Bytes of all tensors, or None if a type is not known."""
        sizes = [tensor.bytes for tensor in self.tensors.values()]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def dominating_type(self) -> str:
        """The type of most numbers."""
        counted: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counted[tensor.type_name] += tensor.numel
        return counted.most_common(1)[0][0]


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do. Raises OSError."""
    with path.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> Header:
    """The header of `path`, and where the model is split, those of its other files.

    Raises InputError for a file that is no GGUF file, is damaged, ends too early or lacks one of its parts.
    """
    header = _read_file(path)
    count = header.fields.get("split.count", 1)
    if type(count) is not int or count < 2:
        return header
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not found or int(found[3]) != count:
        raise InputError(
            f"{path}: is one of {count} files, but not named like it", "expected: NAME-00001-of-00003.gguf"
        )
    parts = [path.with_name(f"{found[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = next((part for part in parts if not part.is_file()), None)
    if missing is not None:
        raise InputError(f"{path}: the part {missing.name} is missing", f"all {count} parts belong in one folder")
    headers = [_read_file(part) for part in parts]
    tensors = {name: tensor for part in headers for name, tensor in part.tensors.items()}
    return Header(headers[0].fields, tensors)


def _read_file(path: Path) -> Header:
    try:
        if path.stat().st_size < SHORTEST:
            raise InputError(f"{path}: is no GGUF file: it has fewer than {SHORTEST} bytes", AGAIN)
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", "check the file and its permissions") from None


class _Reader:
    """Walks through the bytes of a header; long lists are stepped over."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def header(self) -> Header:
        if self.data[:4] != MAGIC:
            raise InputError(f"{self.path}: is no GGUF file", "its first four bytes are not GGUF")
        self.place = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise self.damaged(f"version {version} is not supported, {VERSIONS[0]} and {VERSIONS[1]} are")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        self.check_count(n_fields, 13, MOST_FIELDS, "fields")
        self.check_count(n_tensors, 24, MOST_TENSORS, "tensors")
        fields = {self.text(): self.value(self.number("I")) for _ in range(n_fields)}
        tensors, end = {}, 0
        for _ in range(n_tensors):
            name, tensor, start = self.text(), self.tensor(), self.number("Q")
            tensors[name] = tensor
            end = max(end, start + (tensor.bytes or 0))
        if not tensors and fields.get("split.count", 1) == 1:
            raise self.damaged("it holds no tensors")
        if self.place + end > len(self.data):
            raise self.damaged(f"its tensors end at byte {self.place + end}, the file at {len(self.data)}")
        return Header(fields, tensors)

    def damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged GGUF file: {what}", AGAIN)

    def check_count(self, count: int, least_bytes: int, most: int, what: str) -> None:
        if count > min(most, (len(self.data) - self.place) // least_bytes):
            raise self.damaged(f"it cannot hold {count} {what}")

    def number(self, letter: str) -> Any:
        form = struct.Struct(f"<{letter}")
        if self.place + form.size > len(self.data):
            raise self.damaged("it ends within its header")
        (value,) = form.unpack_from(self.data, self.place)
        self.place += form.size
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.place:
            raise self.damaged(f"it cannot hold a name of {length} bytes")
        self.place += length
        return self.data[self.place - length : self.place].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in SCALARS:
            raise self.damaged(f"its metadata has a value of type {kind}")
        return self.number(SCALARS[kind])

    def array(self, kind: int, count: int) -> tuple[Any, ...] | None:
        """The numbers of a list, or None for one of texts or of more than KEPT numbers."""
        if kind == STRING:
            self.check_count(count, 8, MOST_STRINGS, "texts in a list")
            self.step_over_texts(count)
            return None
        if kind not in SCALARS:
            raise self.damaged(f"its metadata has a list of type {kind}")
        form = struct.Struct(f"<{SCALARS[kind]}")
        self.check_count(count, form.size, len(self.data), "numbers in a list")
        begin, self.place = self.place, self.place + count * form.size
        if count > KEPT:
            return None
        return struct.unpack_from(f"<{count}{SCALARS[kind]}", self.data, begin)

    def step_over_texts(self, count: int) -> None:
        length_at, place, size = struct.Struct("<Q").unpack_from, self.place, len(self.data)
        for _ in range(count):
            if place + 8 > size:
                raise self.damaged("it ends within a list of texts")
            place += 8 + length_at(self.data, place)[0]
        if place > size:
            raise self.damaged("it ends within a list of texts")
        self.place = place

    def tensor(self) -> Tensor:
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.damaged(f"it has a tensor of {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        if 0 in shape:
            raise self.damaged("it has a tensor without numbers")
        return Tensor(shape[::-1], self.number("I"))
