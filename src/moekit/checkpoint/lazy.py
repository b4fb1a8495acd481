"""A model whose tensors are read from its folder when they are first used: a layer's when it runs, an expert's when a
token comes to it."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from moekit.checkpoint.fit import Source
from moekit.checkpoint.groups import STORED, restore_matrix
from moekit.checkpoint.header import Stored
from moekit.checkpoint.weights import TORCH, Weights, finite
from moekit.config.errors import InputError
from moekit.config.quantisation import Fp8Blocks, Groups, Quantisation
from moekit.kernels.groups import Grouped
from moekit.kernels.groups import finite as finite_groups
from moekit.model.transformer import Transformer
from moekit.moe.experts import Experts
from moekit.tensors import Tensor
from moekit.tensors.fp8 import dequantise_blocks

Read = Callable[[str], Tensor]


class Reader:
    """Our tensors from their sources. What is stored as it is wanted is not copied but mapped.

    Quantised rows are wanted as they are where the type is uint8; in any other they are restored.
    """

    def __init__(self, weights: Weights, quantisation: Quantisation | None) -> None:
        self.weights, self.quantisation = weights, quantisation

    def tensor(self, shape: Sequence[int], sources: Sequence[Source], dtype: torch.dtype, device: str) -> Tensor:
        """One of our tensors, of `shape`. Raises InputError where a stored number is not finite."""
        joined = self._mapped(sources, dtype, device)
        if joined is not None:
            return joined.view(tuple(shape))
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        for source in sources:
            as_it_is = dtype == torch.uint8
            values = self.checked(source.piece.hub, source.stored) if as_it_is else self.value(source, dtype)
            (out[source.piece.part] if source.piece.part else out).copy_(values)
        return out

    def value(self, source: Source, dtype: torch.dtype) -> Tensor:
        """What a stored tensor means, in `dtype` where it is quantised, else as it is stored."""
        values = self.checked(source.piece.hub, source.stored)
        if source.grouped:
            assert isinstance(self.quantisation, Groups)
            return restore_matrix(values, self.quantisation, source.shape[-1], dtype)
        if source.scale is None:
            return values
        assert isinstance(self.quantisation, Fp8Blocks)
        scale = self.checked(source.piece.hub, source.scale).float()
        return dequantise_blocks(values, scale, dtype, (self.quantisation.rows, self.quantisation.columns))

    def checked(self, name: str, stored: Stored) -> Tensor:
        """A tensor as it is stored, if its numbers are finite."""
        found = self.weights.read(stored)
        if not self._all_finite(found, stored):
            hint = "the file is damaged, or the training diverged"
            raise InputError(f"{stored.file}: {name} holds numbers that are not finite", hint)
        return found

    def _mapped(self, sources: Sequence[Source], dtype: torch.dtype, device: str) -> Tensor | None:
        stored = [source.stored for source in sources]
        if device != "cpu" or any(TORCH[each.dtype] != dtype for each in stored):
            return None
        joined = self.weights.joined(stored)
        if joined is not None and not self._all_finite(joined, stored[0]):
            for source in sources:
                self.checked(source.piece.hub, source.stored)
        return joined

    def finite(self, stored: Stored) -> bool:
        """Whether the numbers of a tensor are finite."""
        return self._all_finite(self.weights.read(stored), stored)

    def _all_finite(self, values: Tensor, first: Stored) -> bool:
        """Whether the numbers of tensors like `first` are finite; of quantised rows, scales and least values."""
        if first.dtype == STORED and isinstance(self.quantisation, Groups):
            rows = values.view(-1, first.shape[-1])
            return finite_groups(Grouped(rows, self.quantisation.bits, self.quantisation.size))
        return finite(values)


class Unread(dict[str, Any]):
    """A module's `_parameters`, of which each is read when it is first asked for.

    A plain dict of parameters in all else: `parameters()`, `state_dict()`, `to()` and copies read what is left.
    """

    def __init__(self, parameters: Mapping[str, Any], unread: set[str], read: Read) -> None:
        super().__init__(parameters)
        self._unread, self._read = unread, read

    def __getitem__(self, name: str) -> Any:
        self._now(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._now(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self._now(name)
        return super().pop(name, *default)

    def __setitem__(self, name: str, value: Any) -> None:
        self._unread.discard(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._unread.discard(name)
        super().__delitem__(name)

    def items(self) -> Any:
        self._all()
        return super().items()

    def values(self) -> Any:
        self._all()
        return super().values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.copy(),)

    def _now(self, name: str) -> None:
        if name in self._unread:
            # A tensor made in inference mode could never be trained.
            with torch.inference_mode(False), torch.no_grad():
                self[name] = self._read(name)

    def _all(self) -> None:
        for name in sorted(self._unread):
            self._now(name)


class StoredExperts:
    """The experts of a layer one by one, each read when a token first comes to it."""

    def __init__(self, experts: Experts, gate_up: Sequence[Source], down: Sequence[Source], reader: Reader) -> None:
        self.shapes: Sequence[tuple[int, ...]] = [tuple(p.shape[1:]) for p in (experts.gate_up, experts.down)]
        self.dtype = experts.gate_up.dtype
        self.sources = gate_up, down
        self.n_experts = experts.gate_up.shape[0]
        self.reader = reader
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        self.addresses = array("q", bytes(16 * self.n_experts))

    def __call__(self, expert: int) -> tuple[Tensor, Tensor]:
        if expert not in self.known:
            with torch.inference_mode(False):
                gate_up, down = self.known[expert] = (self._read(0, expert), self._read(1, expert))
                self.addresses[2 * expert], self.addresses[2 * expert + 1] = gate_up.data_ptr(), down.data_ptr()
        return self.known[expert]

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies of a model have its parameters, not its files.
        return type(None), ()

    def _read(self, which: int, expert: int) -> Tensor:
        """One of an expert's matrices; its sources follow each other, as parts of that matrix alone."""
        size = len(self.sources[which]) // self.n_experts
        own = self.sources[which][expert * size : (expert + 1) * size]
        inside = [source._replace(piece=source.piece._replace(part=source.piece.part[1:])) for source in own]
        return self.reader.tensor(self.shapes[which], inside, self.dtype, "cpu")


def read_when_used(model: Transformer, sources: Mapping[str, Sequence[Source]], reader: Reader, device: str) -> None:
    """Give the parameters of `model`, which are on the meta device, their values when they are first used."""
    for prefix, module in model.named_modules():
        shapes = {name: p for name, p in module._parameters.items() if p is not None}
        own = {name: sources.get(f"{prefix}.{name}", ()) for name in shapes}
        if isinstance(module, Experts) and device == "cpu" and _one_by_one(own):
            module.stored = StoredExperts(module, own["gate_up"], own["down"], reader)
        if shapes:
            tied = module is model.head and model.config.tie_embeddings
            read = partial(_parameter, module, shapes, own, reader, device)
            parameters = Unread(module._parameters, set(shapes), (lambda _: model.embedding.weight) if tied else read)
            module._parameters = parameters


def _parameter(
    module: nn.Module,
    shapes: Mapping[str, Tensor],
    sources: Mapping[str, Sequence[Source]],
    reader: Reader,
    device: str,
    name: str,
) -> nn.Parameter:
    """Read a parameter of `module`. From then on a layer's experts are its parameters, which may change."""
    if isinstance(module, Experts):
        module.stored = None
    empty = shapes[name]
    value = reader.tensor(empty.shape, sources[name], empty.dtype, device)
    return nn.Parameter(value, requires_grad=empty.requires_grad)


def _one_by_one(sources: Mapping[str, Sequence[Source]]) -> bool:
    """Whether each expert's matrices are tensors of their own."""
    return all(source.piece.part for own in sources.values() for source in own)
