"""Which of a model's matrices groups of whole numbers hold, and a model made ready to hold them."""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from moekit.config.quantisation import Groups
from moekit.kernels.groups import Grouped, quantise, restore, row_bytes
from moekit.kernels.linear import Linear
from moekit.model.transformer import Transformer
from moekit.moe.experts import Experts
from moekit.tensors import Float, Tensor

STORED = "U8"
"""The type of a quantised tensor in a file: [out, bytes of a row]."""

KEPT = (".kv_b", ".shared_gate", "mtp.projection")
"""Linear layers that stay as they are: absorbed into queries while decoding, a vector, and one that others keep too."""

AT_ONCE = 1 << 22
"""Numbers quantised or restored at once: 16 MB in float32."""


def quantisable(model: Transformer) -> dict[str, str]:
    """The names of the tensors that may be quantised, and the path of the module each belongs to.

    Those of all experts of a layer are quantised together or not at all.
    """
    whole_experts = model.config.moe.routing.matrices == 3
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear) and not path.endswith(KEPT) and not _tied(model, module):
            found[f"{path}.weight"] = path
        elif isinstance(module, Experts) and whole_experts:
            found |= {f"{path}.gate_up": path, f"{path}.down": path}
    return found


def grouped_shape(shape: tuple[int, ...], groups: Groups) -> tuple[int, ...] | None:
    """The shape of what holds a tensor of `shape`; None where no whole groups make up a row."""
    return None if shape[-1] % groups.size else (*shape[:-1], row_bytes(shape[-1], groups.bits, groups.size))


def hold_groups(model: Transformer, names: Collection[str], groups: Groups) -> None:
    """Give the tensors `names` of `model`, which are on the meta device, the types and shapes of quantised ones."""
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or f"{path}.{name}" not in names:
                continue
            assert isinstance(module, Linear | Experts)
            shape = grouped_shape(tuple(parameter.shape), groups)
            assert shape is not None
            empty = torch.empty(shape, dtype=torch.uint8, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            module.groups = groups


def groups_of(model: nn.Module) -> Groups | None:
    """How the quantised tensors of `model` are stored; None where it has none."""
    own = (module.groups for module in model.modules() if isinstance(module, Linear | Experts))
    return next((groups for groups in own if groups is not None), None)


def quantise_matrix(weight: Float[Tensor, "*stack O I"], groups: Groups) -> Tensor:
    """The bytes of a matrix's rows, or of those of a stack, a part at a time."""
    shape = grouped_shape(tuple(weight.shape), groups)
    assert shape is not None
    rows = torch.empty(shape, dtype=torch.uint8)
    for part, out in _parts(weight, rows):
        out.copy_(quantise(part, groups.bits, groups.size).rows)
    return rows


def restore_matrix(rows: Tensor, groups: Groups, inputs: int, dtype: torch.dtype) -> Float[Tensor, "*stack O I"]:
    """What the bytes of a matrix's rows, or of those of a stack, stand for, a part at a time."""
    weight = torch.empty(*rows.shape[:-1], inputs, dtype=dtype)
    for out, part in _parts(weight, rows):
        out.copy_(restore(Grouped(part, groups.bits, groups.size), dtype))
    return weight


def _parts(weight: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    at_once = max(AT_ONCE // max(weight.shape[-1], 1), 1)
    return zip(weight.flatten(0, -2).split(at_once), rows.flatten(0, -2).split(at_once), strict=True)


def _tied(model: Transformer, module: nn.Module) -> bool:
    return module is model.head and model.config.tie_embeddings
