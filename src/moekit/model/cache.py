"""What attention remembers of earlier tokens while text is generated."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from moekit.tensors import Tensor

if TYPE_CHECKING:
    from moekit.model.token_step import Program


class LayerCache:
    """The past of one layer: named tensors that grow along the sequence, written in place into room for `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.rooms: dict[str, Tensor] = {}

    def append(self, **new: Tensor) -> list[Tensor]:
        """Add tensors [B, ..., S, width]; returns, in the same order, all so far: [B, ..., past + S, width]."""
        first = next(iter(new.values()))
        shapes = {name: (*value.shape[:-2], value.shape[-1]) for name, value in new.items()}
        start, rooms = self.count(first.shape[-2]), self.room(first, **shapes)
        for room, value in zip(rooms, new.values(), strict=True):
            room[..., start : self.length, :] = value.detach()
        return [room[..., : self.length, :] for room in rooms]

    def count(self, n_new: int) -> int:
        """Count `n_new` more tokens, which the caller writes; returns where the first goes."""
        start, end = self.length, self.length + n_new
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, not {end}")
        self.length = end
        return start

    def room(self, like: Tensor, **shapes: tuple[int, ...]) -> list[Tensor]:
        """All room for tensors by their names: [B, ..., capacity, width] for a shape (B, ..., width), of the type of
        `like` where it is new."""
        for name, (*batch, width) in shapes.items():
            if name not in self.rooms:
                self.rooms[name] = like.new_empty(*batch, self.capacity, width)
        return [self.rooms[name] for name in shapes]


class Cache:
    """The past of a batch of sequences: one LayerCache for each layer, and which places hold padding.

    `n_layers` layers of room for `capacity` tokens. Memory is taken at the first use. `programs` is how compiled code
    takes a token through the model, by what the rows are; like the past, it belongs to the model as it is.
    """

    def __init__(self, n_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(n_layers)]
        self.mask: Tensor | None = None
        self.programs: dict[object, Program | None] = {}

    def __getstate__(self) -> Mapping[str, object]:
        # A copy's past lies elsewhere than the programs of this one say.
        return {**self.__dict__, "programs": {}}

    @property
    def length(self) -> int:
        """Tokens remembered, padding included."""
        return self.layers[0].length if self.layers else 0

    def extend_mask(self, mask: Tensor | None, n_new: int) -> Tensor | None:
        """Which of all tokens, old and new, are real: [B, past + S], or None if all are. True marks a real token."""
        known = mask if mask is not None else self.mask
        if known is None:
            return None
        batch = known.shape[0]
        old = known.new_ones(batch, self.length) if self.mask is None else self.mask
        new = known.new_ones(batch, n_new) if mask is None else mask
        self.mask = torch.cat([old, new], dim=1)
        return self.mask

    def rooms(self) -> list[Tensor]:
        """All room that was taken, layer by layer."""
        return [room for layer in self.layers for room in layer.rooms.values()]

    def bytes(self) -> int:
        """Memory that the cache holds now."""
        return sum(room.nbytes for room in self.rooms())
