"""A router's logits for many tokens, and their gradients, in compiled code: sums in float32 (AVX512)."""

from typing import Any

import torch

from moekit.kernels.experts import LANES, NUMBERS
from moekit.kernels.library import kernels, library
from moekit.tensors import Float, Tensor


def computes(x: Float[Tensor, "T D"], centroids: Float[Tensor, "E D"]) -> bool:
    """Whether tokens and centroids of these types and widths are for the compiled code."""
    fits = x.dtype == centroids.dtype and x.dtype in NUMBERS and x.device.type == "cpu" and x.is_contiguous()
    if not fits or len(centroids) % LANES or x.shape[-1] % LANES or not centroids.is_contiguous():
        return False
    compiled = library()
    return compiled is not None and compiled.moekit_level() >= 2


def product(x: Float[Tensor, "T D"], centroids: Float[Tensor, "E D"]) -> Float[Tensor, "T E"]:
    """x @ centroids^T in float32, without gradients. Call only where `computes`."""
    compiled = kernels()
    found = torch.empty(len(x), len(centroids))
    sizes, threads = (NUMBERS[x.dtype], *x.shape, len(centroids)), torch.get_num_threads()
    compiled.moekit_logits(x.data_ptr(), centroids.data_ptr(), *sizes, found.data_ptr(), threads, 2)
    return found


def gradients(
    x: Float[Tensor, "T D"], centroids: Float[Tensor, "E D"], grad: Float[Tensor, "T E"]
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "E D"]]:
    """Those of `x` and `centroids` that follow from `grad`, the one of their product.

    All are of one type and contiguous; sums are float32. Call only where `computes`.
    """
    found = torch.empty_like(x), torch.empty_like(centroids)
    pointers = (each.data_ptr() for each in (x, centroids, grad))
    sizes, threads = (NUMBERS[x.dtype], *x.shape, len(centroids)), torch.get_num_threads()
    kernels().moekit_logits_backward(*pointers, *sizes, *(each.data_ptr() for each in found), threads, 2)
    return found


class Logits(torch.autograd.Function):
    """`product`, whose gradient is rounded to the type of `x`, as that of any product of this type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centroids: Tensor) -> Tensor:
        ctx.save_for_backward(x, centroids)
        return product(x, centroids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, centroids = ctx.saved_tensors
        return gradients(x, centroids, grads[0].to(x.dtype).contiguous())
