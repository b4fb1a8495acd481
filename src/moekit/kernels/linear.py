"""A linear layer that reads its matrix at the speed of memory where few rows come to it, or the matrix is quantised."""

from typing import Any

import torch
from torch import nn

from moekit.config.errors import InputError
from moekit.config.quantisation import Groups
from moekit.kernels import few_rows
from moekit.kernels.few_rows import Place, placed, placed_bytes
from moekit.kernels.groups import numbers_in
from moekit.kernels.packed import Quantisable
from moekit.tensors import Float, Tensor
from moekit.tensors.memory import InHugePages

MOST = 8
"""Rows up to which the compiled product is the faster one: 2.1 times as fast at one, alike at 8 (2048 x 2048)."""

Described = tuple[int, int, int, int, int, int, int]
"""A matrix's place, and the address of its bias (0: none)."""


class Linear(Quantisable, InHugePages, nn.Linear):
    """As torch's in all else: the same parameters, gradients, types and devices.

    With `groups`, `weight` holds the bytes of a quantised matrix: no gradient passes, and it is one for the CPU.
    """

    def forward(self, input: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape O"]:
        shape, bias = input.shape, self.bias
        if self.groups is None and not reads_once(input, self.weight, input.numel() // max(shape[-1], 1)):
            return super().forward(input)
        rows = input.detach().reshape(-1, shape[-1])
        y = few_rows.linear(rows, self.held(self.weight), input.dtype if bias is None else torch.float32)
        y = y if bias is None else (y + bias.detach()).to(input.dtype)
        return without_gradient(y.view(*shape[:-1], -1), input)

    def described(self, dtype: torch.dtype) -> Described | None:
        """Where matrix and bias lie, for compiled products with rows of `dtype` that pass this module by; None where
        these would not be the same."""
        place, bias = None if must_be_called(self) else place_of(self.weight, self.groups, dtype), self.bias
        if place is None or (bias is not None and not (bias.dtype == dtype and bias.is_contiguous())):
            return None
        return (*place, 0 if bias is None else bias.data_ptr())

    def place(self, dtype: torch.dtype) -> Place | None:
        """Where the matrix of a layer without a bias lies; None as for `described`."""
        found = self.described(dtype) if self.bias is None else None
        return None if found is None else found[:-1]


def listened(module: nn.Module) -> bool:
    """Whether hooks wait for the module's calls, which then must happen."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def must_be_called(module: nn.Module) -> bool:
    """Whether the module is `listened` to, or parametrizations make its weights for each call, which lie nowhere."""
    return listened(module) or "parametrizations" in module._modules


def place_of(weight: Tensor, groups: Groups | None, dtype: torch.dtype) -> Place | None:
    """Where a matrix or the first of a stack lies; None where compiled products with rows of `dtype` cannot read it."""
    if groups is not None:
        return placed_bytes(weight, groups.bits, groups.size)
    readable = weight.dtype == dtype == torch.bfloat16 and weight.stride(-1) == 1 and weight.is_cpu
    return placed(weight) if readable else None


def place_in_file(
    shape: tuple[int, ...], stored: torch.dtype, groups: Groups | None, dtype: torch.dtype
) -> Place | None:
    """As `place_of`, of a matrix of `shape` and type `stored` that is not in memory yet: its address is 0."""
    out, length = shape
    if groups is not None:
        return 0, out, numbers_in(length, groups.bits, groups.size), length, groups.bits, groups.size
    return (0, out, length, 2 * length, 16, 0) if stored == dtype == torch.bfloat16 else None


def in_one_call(x: Tensor, rows: int) -> bool:
    """Whether there are so few rows that operations count, and compiled code that needs one for several products."""
    fits = 0 < rows <= MOST and x.is_cpu and x.dtype in (torch.bfloat16, torch.float32)
    return fits and not torch.is_grad_enabled() and few_rows.runs_here()


def reads_once(x: Tensor, matrix: Tensor, rows: int) -> bool:
    """Whether a product of `rows` rows of `x` with `matrix` is one for the compiled kernels."""
    return (
        0 < rows <= MOST
        and not torch.is_grad_enabled()
        and x.is_cpu
        and matrix.is_cpu
        and x.dtype == matrix.dtype == torch.bfloat16
        and matrix.stride(-1) == 1
        and few_rows.runs_here()
    )


def without_gradient(y: Tensor, *inputs: Tensor) -> Tensor:
    """`y`, computed from quantised weights and `inputs`; asking for a gradient through it raises an InputError."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        return _NoGradient.apply(y, *inputs)
    return y


class _NoGradient(torch.autograd.Function):
    """Where a gradient would have to pass a quantised weight: it must not silently be missing."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor) -> Tensor:  # noqa: ARG004
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # noqa: ARG004
        hint = "moekit convert FOLDER OUT --dtype bfloat16 restores the weights"
        raise InputError("quantised weights give no gradients", hint)
