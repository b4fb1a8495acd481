"""What a model folder holds and what is wrong with it, without loading its weights."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from moekit.checkpoint.description import Description, describe
from moekit.checkpoint.fit import DERIVED, Fit, Source, empty_model, fit
from moekit.checkpoint.folder import Contents, Problem
from moekit.checkpoint.header import Stored
from moekit.checkpoint.lazy import Reader
from moekit.checkpoint.load import check_vocabulary
from moekit.checkpoint.parts import Count, part_of, parts
from moekit.checkpoint.values import all_zero, data_bytes, not_finite
from moekit.checkpoint.weights import Weights
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.config.quantisation import SCALE, Groups
from moekit.data.tokenizer import FILE, load_tokenizer, size
from moekit.model.transformer import Transformer

READ_AT_MOST = 2_000_000_000
"""Bytes of weights whose values are read unasked: seconds from a disk."""


class Space(NamedTuple):
    """Tensors of one type, their numbers and their bytes."""

    tensors: int
    numbers: int
    bytes: int


class Shard(NamedTuple):
    """A file with weights."""

    file: str
    bytes: int
    tensors: int


class Values(NamedTuple):
    """Whether the stored numbers are finite: "finite", "not finite" or "not read"; and how many bytes hold them."""

    state: str
    bytes: int


class Inspection(NamedTuple):
    """What is known of a folder.

    `parts` is None where too little is there to say. `dtypes` counts the scales of FP8 blocks by themselves.
    `part_bytes` are the stored bytes of each part, scales included; none where too little is there.
    `token_ids` are those of the tokenizer. `copies` are tensors that repeat another, `ignored` those that follow from
    the configuration.
    """

    model_type: str
    config: ModelConfig
    parts: dict[str, Count] | None
    dtypes: dict[str, Space]
    shards: tuple[Shard, ...]
    values: Values
    token_ids: int | None
    copies: tuple[str, ...]
    ignored: tuple[str, ...]
    problems: tuple[Problem, ...]
    part_bytes: dict[str, int]


def inspect(folder: Path, read_values: bool | None = None) -> Inspection:
    """Describe the model folder by its headers, and by its values where `read_values` says so (None: if they are few).

    Raises InputError where there is no `config.json`, no weights, or a description of no model.
    """
    found = describe(folder)
    fitted = fit(folder, found)
    tensors = fitted.contents.tensors
    model = fitted.model or _described(folder, found, len(tensors))
    config = found.config if model is None else model.config
    grouped = {source.piece.hub: source for own in fitted.sources.values() for source in own if source.grouped}
    values, wrong = _values(found, tensors, grouped, read_values)
    token_ids, unsuitable = _tokenizer(folder, config)
    copied = found.family.copies(config)
    return Inspection(
        found.family.model_type,
        config,
        None if model is None else parts(model),
        dtypes(found, tensors, grouped),
        _shards(fitted.contents),
        values,
        token_ids,
        tuple(name for name in copied if name in tensors),
        tuple(name for name in tensors if name.endswith(DERIVED)),
        (*fitted.problems, *_not_zero(found, config, tensors), *wrong, *unsuitable),
        _part_bytes(fitted),
    )


def dtypes(found: Description, tensors: Mapping[str, Stored], grouped: Mapping[str, Source]) -> dict[str, Space]:
    """How much is stored in each type; groups are called as in the planner, the scales of FP8 blocks are a type too."""
    spaces: dict[str, Space] = defaultdict(lambda: Space(0, 0, 0))
    for name, stored in tensors.items():
        quantised = tensors.get(name.removesuffix(SCALE)) if name.endswith(SCALE) else None
        scales = quantised is not None and quantised.dtype == "F8_E4M3"
        kind, numbers = f"{stored.dtype} scales" if scales else stored.dtype, stored.numel
        if name in grouped and isinstance(found.quantisation, Groups):
            kind, numbers = found.quantisation.name, math.prod(grouped[name].shape)
        before = spaces[kind]
        size = stored.stop - stored.start
        spaces[kind] = Space(before.tensors + 1, before.numbers + numbers, before.bytes + size)
    return dict(sorted(spaces.items(), key=lambda item: -item[1].bytes))


def _described(folder: Path, found: Description, n_stored: int) -> Transformer | None:
    """The model of `config.json` alone, where files are missing or damaged."""
    try:
        return empty_model(found.config, folder, n_stored)
    except InputError:
        return None


def _shards(held: Contents) -> tuple[Shard, ...]:
    counts = Counter(stored.file for stored in held.tensors.values())
    return tuple(Shard(file.name, file.stat().st_size, counts[file]) for file in held.files if file.is_file())


def _part_bytes(fitted: Fit) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for ours, sources in fitted.sources.items():
        for stored in (each for own in sources for each in (own.stored, own.scale) if each is not None):
            sizes[part_of(ours)] += stored.stop - stored.start
    return dict(sizes)


def _values(
    found: Description, tensors: Mapping[str, Stored], grouped: Mapping[str, Source], read: bool | None
) -> tuple[Values, list[Problem]]:
    n_bytes = data_bytes(dict.fromkeys(stored.file for stored in tensors.values()))
    if not (n_bytes <= READ_AT_MOST if read is None else read):
        return Values("not read", n_bytes), []
    wrong = [
        Problem("not finite", f"{tensors[name].file}: {name} holds numbers that are not finite")
        for name in (*not_finite(tensors), *_groups_not_finite(found, tensors, grouped))
    ]
    return Values("not finite" if wrong else "finite", n_bytes), wrong


def _groups_not_finite(
    found: Description, tensors: Mapping[str, Stored], grouped: Mapping[str, Source]
) -> Iterator[str]:
    """Quantised tensors with scales that are not finite."""
    reader = Reader(Weights(tensors), found.quantisation) if grouped else None
    for name, source in grouped.items():
        if reader is not None and source.stored.shape[-1] and not reader.finite(source.stored):
            yield name


def _not_zero(found: Description, config: ModelConfig, tensors: Mapping[str, Stored]) -> Iterator[Problem]:
    """What stands in the file only because others want it must have no effect."""
    for name in sorted(found.family.blank(config) & tensors.keys()):
        if not all_zero(tensors[name]):
            text = f"{tensors[name].file}: {name} is not zero, but config.json has no use for it"
            yield Problem("not zero", text)


def _tokenizer(folder: Path, config: ModelConfig) -> tuple[int | None, list[Problem]]:
    """How many ids the tokenizer has, and whether it suits the model."""
    if not (folder / FILE).exists():
        return None, []
    token_ids = None
    try:
        tokenizer = load_tokenizer(folder)
        token_ids = size(tokenizer)
        check_vocabulary(tokenizer, config, folder)
    except InputError as error:
        return token_ids, [Problem("tokenizer", str(error), error.hint)]
    return token_ids, []
