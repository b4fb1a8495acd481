"""A layer's job for few tokens, kept for as long as all that it was made of stays as it is.

To describe a layer anew, Python waits for memory that the layer's weights have pushed out of the caches.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from moekit.kernels.choice import Steering
from moekit.kernels.linear import must_be_called
from moekit.kernels.mixture import Mixture
from moekit.tensors import Tensor

Layout = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]
"""Where a tensor lies, and how."""


class Part(NamedTuple):
    """What one module of a layer was: where it hangs, what it held, and where its parameters lay.

    No weight is kept alive by it.
    """

    parent: int
    name: str
    kind: type[nn.Module]
    n_attributes: int
    n_modules: int
    settings: list[tuple[str, object]]
    parameters: list[tuple[str, Layout | None]]

    def describes(self, module: nn.Module) -> bool:
        """Whether `module` is that still."""
        if type(module) is not self.kind:
            return False
        held: dict[str, Any] = module.__dict__
        if len(held) != self.n_attributes or len(held["_modules"]) != self.n_modules:
            return False
        for name, value in self.settings:
            if held.get(name) is not value:
                return False
        parameters: dict[str, Any] = held["_parameters"]
        return all(layout_of(dict.get(parameters, name)) == layout for name, layout in self.parameters)


class Kept:
    """The last job of a layer. A copy of this has none."""

    def __init__(self) -> None:
        self._last: tuple[object, list[Part], Mixture] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()

    def known(self, layer: nn.Module, x: Tensor, steered: Steering) -> Mixture | None:
        """The job of `layer` for rows like `x`, chosen for with `steered`; None where it must be described."""
        if self._last is None:
            return None
        key, parts, mixture = self._last
        return mixture if key == _key(x, steered) and _unchanged(layer, parts) else None

    def keep(self, layer: nn.Module, x: Tensor, steered: Steering, mixture: Mixture) -> None:
        """Keep a job that was just described; not one that points to copies of what steers the choice."""
        own = all(each is None or (each.dtype == torch.float32 and each.is_contiguous()) for each in steered)
        self._last = (_key(x, steered), _parts(layer), mixture) if own else None


def layout_of(tensor: Tensor | None) -> Layout | None:
    """Two tensors for which this is the same are one to compiled code."""
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _key(x: Tensor, steered: Steering) -> object:
    bias, factor = steered
    return x.shape, x.dtype, layout_of(bias), layout_of(factor)


def _parts(layer: nn.Module) -> list[Part]:
    """The layer, then each module after that which holds it."""
    parts, found = list[Part](), [(0, "", layer)]
    for at, (parent, name, module) in enumerate(found):
        held, children = vars(module), module._modules
        found += [(at, below, child) for below, child in children.items() if child is not None]
        settings = [(key, value) for key, value in held.items() if not key.startswith("_")]
        # A plain dict's look: what is still on disk is read where a module is asked for it.
        parameters = [(key, layout_of(value)) for key, value in dict.items(module._parameters)]
        parts.append(Part(parent, name, type(module), len(held), len(children), settings, parameters))
    return parts


def _unchanged(layer: nn.Module, parts: list[Part]) -> bool:
    """Whether a layer is what `parts` say and may be passed over; who listens to the layer itself hears it anyway."""
    found = list[nn.Module]()
    for part in parts:
        module = found[part.parent]._modules.get(part.name) if found else layer
        if module is None or (found and must_be_called(module)) or not part.describes(module):
            return False
        found.append(module)
    return True
