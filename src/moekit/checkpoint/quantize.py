"""Write a folder's experts and dense matrices as groups of 8- or 4-bit numbers, tensor by tensor."""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch

from moekit.checkpoint.description import describe
from moekit.checkpoint.fit import Fit, Source, fitting
from moekit.checkpoint.groups import STORED, grouped_shape, quantisable, quantise_matrix
from moekit.checkpoint.lazy import Reader
from moekit.checkpoint.parts import part_of
from moekit.checkpoint.rewrite import OnBytes, further, in_type, rewrite, unchanged, words
from moekit.checkpoint.shards import SHARD_BYTES, Entry
from moekit.checkpoint.weights import Weights
from moekit.config.errors import InputError
from moekit.config.quantisation import KEY, Groups, write_quantisation
from moekit.kernels.groups import Grouped, finite
from moekit.model.transformer import Transformer
from moekit.tensors import Tensor


class PartBytes(NamedTuple):
    """A part of the model: its numbers, and the bytes that held and hold them."""

    part: str
    numbers: int
    before: int
    after: int


class Quantised(NamedTuple):
    """What was written. `undivided` are the tensors that stayed as they were because no whole groups make up a row."""

    parts: tuple[PartBytes, ...]
    undivided: tuple[str, ...]


def quantize(
    source: Path,
    target: Path,
    groups: Groups,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda done, total: None,  # noqa: ARG005
) -> Quantised:
    """Write the model of the folder `source` into the new folder `target`, its large matrices in `groups`.

    Routers, norms, embeddings and tied heads, biases, shared gates, `kv_b` of latent attention and the projection of
    multi-token prediction stay as they are, as do the tensors that a pattern of `groups.kept` names: a shell pattern of
    our names, or a part of the model. One tensor is in memory at a time.

    Raises InputError for a source that is damaged or quantised, a pattern that names nothing, numbers that are not
    finite or too large for a scale in float16, and for a target that exists; then no target appears.
    """
    found = describe(source)
    if isinstance(found.quantisation, Groups):
        hint = "moekit convert FOLDER OUT --dtype bfloat16 restores it first, but its losses stay"
        raise InputError(f"{source}: is quantised already ({found.quantisation.name})", hint)
    empty, fitted = fitting(source, found)
    words(source)
    chosen, undivided = _chosen(empty, fitted, groups)
    reader = Reader(Weights(fitted.contents.tensors), found.quantisation)
    written = {ours: list(_entries(own, reader, groups, ours in chosen)) for ours, own in fitted.sources.items()}
    entries = [entry for own in written.values() for entry in own]
    for extra in further(found, fitted):
        entries += _entries([extra], reader, groups, extra.piece.ours in chosen)
    rewrite(source, target, entries, found.data | {KEY: write_quantisation(groups)}, shard_bytes, on_bytes)
    return Quantised(tuple(_parts(empty, fitted, written)), tuple(undivided))


def _chosen(model: Transformer, fitted: Fit, groups: Groups) -> tuple[set[str], list[str]]:
    """The tensors to quantise, and those that cannot be. What one of a layer's expert stacks is spared, both are."""
    allowed = quantisable(model)
    asked = {path for pattern in groups.kept for path in _matching(pattern, allowed)}
    undivided = [
        name for name in allowed if any(grouped_shape(own.shape, groups) is None for own in fitted.sources[name])
    ]
    spared = asked | {allowed[name] for name in undivided}
    chosen = {name for name, path in allowed.items() if path not in spared}
    if not chosen:
        raise InputError(f"no matrix is left to quantise in {groups.name}", "choose another --group, or --keep less")
    return chosen, [name for name in undivided if allowed[name] not in asked]


def _matching(pattern: str, allowed: dict[str, str]) -> set[str]:
    """The modules of the tensors that a pattern names. Raises InputError where there is none."""
    found = {path for name, path in allowed.items() if pattern == part_of(name) or fnmatchcase(name, pattern)}
    if not found:
        names = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in allowed})
        known = ", ".join([*sorted({part_of(name) for name in allowed}), *names])
        raise InputError(f"--keep {pattern}: names nothing that would be quantised", f"there are {known}")
    return found


def _entries(sources: Sequence[Source], reader: Reader, groups: Groups, quantised: bool) -> Iterator[Entry]:
    for source in sources:
        shape = grouped_shape(source.shape, groups) if quantised else None
        if shape is not None:
            yield Entry(source.piece.hub, STORED, shape, lambda source=source: _rows(source, reader, groups))
        elif source.scale is not None:
            # One folder says one format: what is not in groups comes out of its FP8 blocks.
            yield in_type(source, reader, torch.bfloat16)
        else:
            yield from unchanged(source, reader)


def _rows(source: Source, reader: Reader, groups: Groups) -> Tensor:
    rows = quantise_matrix(reader.value(source, torch.float32), groups)
    if not finite(Grouped(rows, groups.bits, groups.size)):
        name = source.piece.hub
        raise InputError(f"{name}: holds numbers too large for scales in float16", f"--keep {source.piece.ours}")
    return rows


def _parts(model: Transformer, fitted: Fit, written: dict[str, list[Entry]]) -> Iterator[PartBytes]:
    """The bytes of each part, the largest first."""
    sums: dict[str, PartBytes] = {}
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for ours, sources in fitted.sources.items():
        before = sum(each.stop - each.start for own in sources for each in (own.stored, own.scale) if each is not None)
        after, part = sum(entry.bytes for entry in written[ours]), part_of(ours)
        _, numbers, old, new = sums.get(part, PartBytes(part, 0, 0, 0))
        sums[part] = PartBytes(part, numbers + shapes[ours], old + before, new + after)
    return iter(sorted(sums.values(), key=lambda part: -part.before))
