"""How two model folders differ, in our names: whatever their layouts, types, shards and families are."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from moekit.checkpoint.description import describe
from moekit.checkpoint.fit import Source, fitting
from moekit.checkpoint.lazy import Reader
from moekit.checkpoint.weights import TORCH, Weights
from moekit.config.describe import describe as fields_of
from moekit.config.families import meaning
from moekit.config.model import ModelConfig
from moekit.tensors import Tensor

QUANTISED = {torch.float8_e4m3fn, torch.uint8}
"""Types in which a number means nothing without its scale."""

AT_ONCE = 1 << 20
"""Numbers that are compared at once in float64: 8 MB of each side."""


class FieldDifference(NamedTuple):
    """A field of the configuration with its value on both sides; None where a side has no such field."""

    field: str
    a: str | None
    b: str | None


class TensorDifference(NamedTuple):
    """How one of our tensors differs.

    `state` is "identical" (type and bits), "same values", "different", "other shape", "only in A" or "only in B".
    `largest` and `mean` are of |a - b|, `relative` is ||a - b|| / ||a||, None where that is no number.
    """

    name: str
    state: str
    dtypes: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    largest: float | None = None
    mean: float | None = None
    relative: float | None = None


class Difference(NamedTuple):
    """All that was compared."""

    configuration: tuple[FieldDifference, ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def identical(self) -> bool:
        """Whether both folders hold the same model, bit by bit."""
        return not self.configuration and all(tensor.state == "identical" for tensor in self.tensors)


class Side:
    """One of the folders. Raises InputError unless it is whole."""

    def __init__(self, folder: Path) -> None:
        found = describe(folder)
        model, fitted = fitting(folder, found)
        self.config = model.config
        self.sources = fitted.sources
        self.shapes = {name: tuple(p.shape) for name, p in model.state_dict().items() if name in fitted.sources}
        self.reader = Reader(Weights(fitted.contents.tensors), found.quantisation)

    def dtype(self, name: str) -> str | None:
        """The types in which a tensor is stored, in the words of the format."""
        return "+".join(sorted({source.stored.dtype for source in self.sources.get(name, [])})) or None

    def matrices(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The tensor in `dtype`, or each expert's matrix of a stack: a layer's experts together may be large."""
        shape, sources = self.shapes[name], self.sources[name]
        if len(shape) < 3:
            yield self.reader.tensor(shape, sources, dtype, "cpu")
        elif sources[0].piece.part:
            for _, own in groupby(sources, key=lambda source: source.piece.part[0]):
                yield self.reader.tensor(shape[1:], [_inside(source) for source in own], dtype, "cpu")
        else:
            yield from self.reader.tensor(shape, sources, dtype, "cpu")


def compare(a: Path, b: Path, on_tensor: Callable[[int, int], None] | None = None) -> Difference:
    """Compare two model folders, one tensor at a time. `on_tensor` hears how many tensors of how many are done.

    What is quantised is read in the other side's type, as a conversion to it would be, and in float32 if both are.
    """
    sides = Side(a), Side(b)
    names = list(sides[0].shapes | sides[1].shapes)
    tensors = []
    for done, name in enumerate(names, 1):
        tensors.append(_tensor(name, *sides))
        if on_tensor is not None:
            on_tensor(done, len(names))
    return Difference(configuration(sides[0].config, sides[1].config), tuple(tensors))


def configuration(a: ModelConfig, b: ModelConfig) -> tuple[FieldDifference, ...]:
    """The fields that differ and matter for what the models compute; how they are trained does not."""
    fields = [
        {
            field.key: field.value
            for field in fields_of(replace(config, moe=replace(config.moe, balance=()), init_std=0.0))
        }
        for config in (meaning(a), meaning(b))
    ]
    return tuple(
        FieldDifference(key, fields[0].get(key), fields[1].get(key))
        for key in fields[0] | fields[1]
        if fields[0].get(key) != fields[1].get(key)
    )


def _tensor(name: str, a: Side, b: Side) -> TensorDifference:
    dtypes = a.dtype(name), b.dtype(name)
    shapes = a.shapes.get(name), b.shapes.get(name)
    if shapes[0] != shapes[1]:
        state = "only in A" if shapes[1] is None else "only in B" if shapes[0] is None else "other shape"
        return TensorDifference(name, state, dtypes, shapes)
    kinds = _kind(a.sources[name], b.sources[name]), _kind(b.sources[name], a.sources[name])

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(a.matrices(name, kinds[0]), b.matrices(name, kinds[1]), strict=True)

    if dtypes[0] == dtypes[1] and all(torch.equal(_bits(x), _bits(y)) for x, y in pairs()):
        return TensorDifference(name, "identical", dtypes, shapes, 0.0, 0.0, 0.0)
    largest, mean, relative = _figures(pairs())
    state = "different" if largest else "same values"
    return TensorDifference(name, state, dtypes, shapes, largest, mean, relative)


def _figures(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float | None]:
    """Largest and mean |a - b|, and ||a - b|| / ||a||, over the tensors of all pairs, in float64."""
    largest = total = squares = norm = 0.0
    count = 0
    for a, b in pairs:
        for left, right in zip(a.flatten().split(AT_ONCE), b.flatten().split(AT_ONCE), strict=True):
            reference = left.double()
            difference = (reference - right.double()).abs_()
            largest = max(largest, float(difference.amax()) if len(difference) else 0.0)
            total += float(difference.sum())
            squares += float(difference.square().sum())
            norm += float(reference.square().sum())
            count += len(difference)
    relative = (squares / norm) ** 0.5 if norm else None
    return largest, total / max(count, 1), relative if largest else 0.0


def _kind(own: list[Source], others: list[Source]) -> torch.dtype:
    """The type in which a tensor is read: as it is stored."""
    found = {TORCH[source.stored.dtype] for source in own}
    if not found & QUANTISED:
        return reduce(torch.promote_types, found)
    plain = (found | {TORCH[source.stored.dtype] for source in others}) - QUANTISED
    return reduce(torch.promote_types, plain) if plain else torch.float32


def _bits(tensor: Tensor) -> Tensor:
    """The numbers as whole ones: zeros of both signs differ."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _inside(source: Source) -> Source:
    """The source as a part of its expert's matrix alone."""
    return source._replace(piece=source.piece._replace(part=source.piece.part[1:]))
