"""FP8 simulated from outside: the products inside the blocks take weights and inputs that FP8 can hold.

Embedding, head, norms, routers, shared gates and the projection of multi-token prediction stay as they are, as in
DeepSeek-V3's checkpoint, and so does attention itself (arXiv 2412.19437, section 3.3.1). Products are summed in the
model's type. Gradients are not rounded. One-token decoding of latent attention skips the product with `kv_b`, and
with it the rounding of that product's input.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from moekit.config.errors import InputError
from moekit.kernels.linear import Linear
from moekit.model.transformer import Transformer
from moekit.moe.experts import Experts
from moekit.tensors import Tensor
from moekit.tensors.fp8 import round_blocks, round_rows


@contextmanager
def simulated_fp8(model: Transformer) -> Iterator[None]:
    """Weights and activations as FP8 holds them; afterwards the model is what it was, bit by bit.

    It takes the memory of a second copy of these weights.
    """
    parameters = dict(model.named_parameters())
    roundings = weight_roundings(model)
    kept = {name: parameters[name].data for name in roundings}
    with round_activations(model):
        try:
            for name, rounding in roundings.items():
                parameters[name].data = rounding(kept[name])
            yield
        finally:
            for name, weight in kept.items():
                parameters[name].data = weight


def round_activations(model: Transformer) -> ExitStack:
    """From now on round the inputs of the products to FP8 (`round_rows`), until the result is closed."""
    undo = ExitStack()
    for _, module in _products(model):
        undo.callback(module.register_forward_pre_hook(_round_first).remove)
        if isinstance(module, Experts):
            undo.callback(setattr, module, "round_inner", module.round_inner)
            module.round_inner = round_rows
    return undo


def weight_roundings(model: Transformer) -> dict[str, Callable[[Tensor], Tensor]]:
    """How each weight that FP8 would hold is rounded to it, by the parameter's name.

    Each expert, and gate and up in each, has blocks of its own, as released checkpoints hold each as a tensor. Raises
    InputError where weights are quantised already.
    """
    if any(module.groups is not None for module in model.modules() if isinstance(module, Linear | Experts)):
        raise InputError("FP8 cannot be simulated on quantised weights", "give the folder they were quantised from")
    names = [
        f"{path}.{name}"
        for path, module in _products(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    return {name: partial(round_blocks, parts=2 if "gate_up" in name else 1) for name in names}


def _products(model: Transformer) -> Iterator[tuple[str, nn.Linear | Experts]]:
    """The modules whose products would run in FP8, and their paths in the model."""
    for path, module in model.named_modules():
        inside = path.startswith(("layers.", "mtp.block.")) and not path.endswith(".shared_gate")
        if inside and isinstance(module, nn.Linear | Experts):
            yield path, module


def _round_first(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
    """A forward pre-hook: the first argument is the activation. Experts gather rows of it, which changes no row."""
    return round_rows(inputs[0]), *inputs[1:]
