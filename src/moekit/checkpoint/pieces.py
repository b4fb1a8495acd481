"""Which part of which of our tensors each tensor of a checkpoint is, in both directions from one map."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moekit.config.families import Names
from moekit.tensors import Tensor


class Piece(NamedTuple):
    """The tensor `hub` of a checkpoint is `ours[part]`."""

    hub: str
    ours: str
    part: tuple[int | slice, ...]


def pieces(shapes: Mapping[str, tuple[int, ...]], names: Names | None) -> Iterator[Piece]:
    """The checkpoint's tensors that make up our tensors of the given shapes. Without names each is its own."""
    for ours, shape in shapes.items():
        hub = ours if names is None else names[ours]
        parts = (hub,) if isinstance(hub, str) else hub
        experts = range(shape[0]) if "{expert}" in parts[0] else (None,)
        for expert in experts:
            rows_at = 0 if expert is None else 1
            size = shape[rows_at] // len(parts) if len(parts) > 1 else None
            for number, part in enumerate(parts):
                rows = () if size is None else (slice(number * size, (number + 1) * size),)
                name = part if expert is None else part.format(expert=expert)
                yield Piece(name, ours, rows if expert is None else (expert, *rows))


def take(tensor: Tensor, piece: Piece) -> Tensor:
    """The part of our tensor that the piece names, as a view."""
    return tensor[piece.part] if piece.part else tensor


def piece_shape(shape: tuple[int, ...], piece: Piece) -> tuple[int, ...]:
    """The shape of the part of a tensor of `shape` that the piece names."""
    for index in piece.part:
        shape = shape[1:] if isinstance(index, int) else (index.stop - index.start, *shape[1:])
    return shape
