"""AdamW over many tensors at once, each number read and written once, and the norm of their gradients."""

import ctypes
import math
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw as torch_adamw

from moekit.kernels.library import library
from moekit.tensors import Tensor


class Move(NamedTuple):
    """One float32 tensor's step number `number` (from 1) along `gradient`, bfloat16 or float32.

    `mean` and `square` are the running means of gradients and their squares. If `rounded` is given, the new parameter
    goes there, too, in its type.
    """

    parameter: Tensor
    mean: Tensor
    square: Tensor
    gradient: Tensor
    number: int
    lr: float
    weight_decay: float
    rounded: Tensor | None = None


class Rule(NamedTuple):
    """What all tensors share; gradients are taken `factor` times."""

    beta1: float
    beta2: float
    epsilon: float
    factor: float = 1.0


class _Gradient(ctypes.Structure):
    """`moekit_gradient` of adamw.cpp."""

    _fields_ = (("values", c_void_p), ("n", c_int64), ("narrow", c_int32))


class _Move(ctypes.Structure):
    """`moekit_move` of adamw.cpp."""

    _fields_ = (
        ("gradient", _Gradient),
        ("parameter", c_void_p),
        ("mean", c_void_p),
        ("square", c_void_p),
        ("rounded", c_void_p),
        ("keep", c_float),
        ("rate", c_float),
        ("root", c_float),
    )


@torch.no_grad()
def adamw(moves: Sequence[Move], rule: Rule) -> None:
    """Move the parameters, their running means and their roundings in place: torch.optim.AdamW's formula."""
    compiled = library()
    if compiled is None or not all(map(_is_ours, moves)):
        adamw_twin(moves, rule)
        return
    # What the addresses point into must live until the call returns.
    gradients = [move.gradient.contiguous() for move in moves]
    described = [_move(move, gradient, rule) for move, gradient in zip(moves, gradients, strict=True)]
    given = (_Move * len(moves))(*described)
    threads, level = torch.get_num_threads(), compiled.moekit_level()
    compiled.moekit_adamw(given, len(moves), rule.beta1, rule.beta2, rule.epsilon, rule.factor, threads, level)


@torch.no_grad()
def adamw_twin(moves: Sequence[Move], rule: Rule) -> None:
    """As `adamw`, by torch."""
    for move in moves:
        gradient = move.gradient.float()
        if rule.factor != 1:
            gradient = gradient * rule.factor
        # Torch counts the step itself.
        before = torch.tensor(float(move.number - 1), device=move.parameter.device)
        torch_adamw(
            [move.parameter],
            [gradient],
            [move.mean],
            [move.square],
            [],
            [before],
            fused=True,
            amsgrad=False,
            beta1=rule.beta1,
            beta2=rule.beta2,
            lr=move.lr,
            weight_decay=move.weight_decay,
            eps=rule.epsilon,
            maximize=False,
        )
        if move.rounded is not None:
            move.rounded.copy_(move.parameter)


@torch.no_grad()
def norm(gradients: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients together."""
    compiled = library()
    if compiled is None or not all(map(_readable, gradients)):
        return norm_twin(gradients)
    kept = [gradient.contiguous() for gradient in gradients]
    described = (_Gradient * len(kept))(*map(_gradient, kept))
    total = c_double()
    threads, level = torch.get_num_threads(), compiled.moekit_level()
    compiled.moekit_squares(described, len(kept), ctypes.byref(total), threads, level)
    return math.sqrt(total.value)


def norm_twin(gradients: Sequence[Tensor]) -> float:
    """As `norm`, by torch."""
    # In float32, torch's sum over tens of millions of numbers was off by 0.4 % (torch 2.13).
    return math.sqrt(sum(torch.linalg.vector_norm(g, dtype=torch.float64).item() ** 2 for g in gradients))


def _is_ours(move: Move) -> bool:
    """Whether the compiled loops can run over these tensors, number by number."""
    own = (move.parameter, move.mean, move.square)
    ordinary = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in own)
    rounded = move.rounded
    plain = rounded is None or (rounded.dtype == torch.bfloat16 and rounded.is_contiguous())
    return ordinary and plain and _readable(move.gradient) and move.gradient.shape == move.parameter.shape


def _readable(gradient: Tensor) -> bool:
    return gradient.device.type == "cpu" and gradient.dtype in (torch.bfloat16, torch.float32)


def _gradient(gradient: Tensor) -> _Gradient:
    return _Gradient(gradient.data_ptr(), gradient.numel(), gradient.dtype == torch.bfloat16)


def _move(move: Move, gradient: Tensor, rule: Rule) -> _Move:
    return _Move(
        _gradient(gradient),
        move.parameter.data_ptr(),
        move.mean.data_ptr(),
        move.square.data_ptr(),
        None if move.rounded is None else move.rounded.data_ptr(),
        1 - move.lr * move.weight_decay,
        move.lr / (1 - rule.beta1**move.number),
        math.sqrt(1 - rule.beta2**move.number),
    )
