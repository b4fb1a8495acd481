"""RMSNorm (arXiv 1910.07467) and its gradient, each in one pass over the rows."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch

from moekit.kernels.library import kernels, library, reaches
from moekit.tensors import Float, Tensor

LEAST = 2.0**-20
"""The least magnitude of weights for which x / rms(x) is found again in y: zero would leave nothing of it."""


class Normed(NamedTuple):
    """x / rms(x) times the weight, and for the backward 1 / rms(x); and x / rms(x), where `y` would not tell it."""

    y: Float[Tensor, "*shape D"]
    scale: Float[Tensor, "*shape 1"]
    unit: Float[Tensor, "*shape D"] | None


class _Norm(ctypes.Structure):
    """`moekit_norm` of norm.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "weight", "y", "grad", "grad_x", "scale", "grad_weight")),
        *((name, c_int64) for name in ("n_rows", "width")),
        ("epsilon", c_float),
        ("narrow", c_int32),
    )


def norm(x: Float[Tensor, "*shape D"], weight: Float[Tensor, " D"], epsilon: float) -> Normed:
    """RMSNorm of rows; the mean is taken in float32."""
    x = x.contiguous()
    if not _is_ours(x, weight) or bool((weight.detach().abs() < LEAST).any()):
        return norm_twin(x, weight, epsilon)
    found = Normed(torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), None)
    _call("moekit_norm_forward", x, epsilon, {"x": x, "weight": weight, "y": found.y, "scale": found.scale})
    return found


def norm_alone(x: Float[Tensor, "*shape D"], weight: Float[Tensor, " D"], epsilon: float) -> Float[Tensor, "*shape D"]:
    """RMSNorm of rows, without what a gradient would want."""
    x = x.contiguous()
    if not _is_ours(x, weight):
        return norm_twin(x, weight, epsilon).y
    y = torch.empty_like(x)
    _call_rows(x, None, weight, None, y, epsilon)
    return y


def norm_of_sum(
    x: Float[Tensor, "*shape D"], added: Float[Tensor, "*shape D"], weight: Float[Tensor, " D"], epsilon: float
) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, "*shape D"]]:
    """x + added, and its RMSNorm; without what a gradient would want."""
    x, added = x.contiguous(), added.contiguous()
    if not (_is_ours(x, weight) and added.dtype == x.dtype):
        total = x + added
        return total, norm_alone(total, weight, epsilon)
    total, y = torch.empty_like(x), torch.empty_like(x)
    _call_rows(x, added, weight, total, y, epsilon)
    return total, y


def norm_backward(
    normed: Normed, weight: Float[Tensor, " D"], grad: Float[Tensor, "*shape D"]
) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, " D"]]:
    """The gradients of x and weight."""
    (y, scale, unit), grad = normed, grad.contiguous()
    if unit is not None:
        return norm_backward_twin(unit, weight, scale, grad)
    if not (_is_ours(y, weight) and grad.dtype == y.dtype):
        return norm_backward_twin(y / weight, weight, scale, grad)
    grad_x, grad_weight = torch.empty_like(y), torch.empty(y.shape[-1], dtype=torch.float32)
    tensors = {"weight": weight, "y": y, "scale": scale, "grad": grad}
    _call("moekit_norm_backward", y, 0.0, {**tensors, "grad_x": grad_x, "grad_weight": grad_weight})
    return grad_x, grad_weight.to(weight.dtype)


def norm_twin(x: Float[Tensor, "*shape D"], weight: Float[Tensor, " D"], epsilon: float) -> Normed:
    """As `norm`, by torch."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    unit = (wide * scale).to(x.dtype)
    return Normed(unit * weight, scale, unit)


def norm_backward_twin(
    unit: Float[Tensor, "*shape D"],
    weight: Float[Tensor, " D"],
    scale: Float[Tensor, "*shape 1"],
    grad: Float[Tensor, "*shape D"],
) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, " D"]]:
    """As `norm_backward`, by torch."""
    grad_unit = grad * weight
    projection = (grad_unit * unit).mean(dim=-1, keepdim=True)
    grad_weight = (grad * unit).flatten(end_dim=-2).sum(dim=0) if grad.dim() > 1 else grad * unit
    return torch.addcmul(grad_unit, unit, projection, value=-1).mul_(scale), grad_weight


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return library() is not None and reaches(x) and x.dtype == weight.dtype and weight.is_contiguous()


def _call_rows(
    x: Tensor, added: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, epsilon: float
) -> None:
    compiled = kernels()
    width = x.shape[-1]
    compiled.moekit_norm_rows(
        x.data_ptr(),
        None if added is None else added.data_ptr(),
        weight.data_ptr(),
        None if total is None else total.data_ptr(),
        y.data_ptr(),
        x.numel() // width,
        width,
        epsilon,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        compiled.moekit_level(),
    )


def _call(function: str, x: Tensor, epsilon: float, tensors: dict[str, Tensor]) -> None:
    compiled = kernels()
    width = x.shape[-1]
    job = _Norm(**{name: tensor.data_ptr() for name, tensor in tensors.items()}, n_rows=x.numel() // width, width=width)
    job.epsilon, job.narrow = epsilon, x.dtype == torch.bfloat16
    getattr(compiled, function)(ctypes.byref(job), torch.get_num_threads(), compiled.moekit_level())
