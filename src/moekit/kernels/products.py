"""Several linear layers with the same few rows, in one compiled call."""

import ctypes
from collections.abc import Sequence
from struct import Struct

import torch

from moekit.kernels.library import library
from moekit.kernels.linear import Linear, in_one_call, place_of
from moekit.tensors import Float, Tensor

PRODUCT = Struct("=QqqqiiQQq")
"""How `moekit_product` of products.cpp lies in memory."""


def run_here(x: Float[Tensor, "*shape I"], layers: Sequence[Linear], dtype: torch.dtype) -> bool:
    """Whether the compiled call computes what these layers of a model in `dtype` would: few rows, no gradients, on a
    CPU, and nothing listens."""
    return (
        in_one_call(x, x.numel() // max(x.shape[-1], 1))
        and dtype in (torch.bfloat16, torch.float32)
        and all(_fits(layer, dtype) for layer in layers)
    )


def products(
    x: Float[Tensor, "*shape I"], layers: Sequence[Linear], dtype: torch.dtype
) -> list[Float[Tensor, "*shape _"]]:
    """x W^T + b of each layer in `dtype`: x and results are bfloat16 or float32, and `run_here` said yes."""
    compiled = library()
    assert compiled is not None
    x = x.contiguous()
    shape, rows = x.shape[:-1], x.numel() // x.shape[-1]
    jobs, found = [], []
    for layer in layers:
        weight, bias = layer.weight, layer.bias
        place = place_of(weight, layer.groups, torch.bfloat16)
        assert place is not None
        y = torch.empty(*shape, place[1], dtype=dtype)
        address, narrow = (0, 0) if bias is None else (bias.data_ptr(), bias.dtype == torch.bfloat16)
        jobs.append(PRODUCT.pack(*place, address, y.data_ptr(), narrow))
        found.append(y)
    described, types = b"".join(jobs), (x.dtype == torch.bfloat16, dtype == torch.bfloat16)
    threads, level = torch.get_num_threads(), _level(compiled)
    compiled.moekit_products(described, len(jobs), x.data_ptr(), rows, *types, threads, level)
    return found


def _fits(layer: Linear, dtype: torch.dtype) -> bool:
    if layer._forward_pre_hooks or layer._forward_hooks or place_of(layer.weight, layer.groups, dtype) is None:
        return False
    bias = layer.bias
    return bias is None or (bias.dtype in (torch.bfloat16, torch.float32) and bias.is_contiguous())


def _level(compiled: ctypes.CDLL) -> int:
    return compiled.moekit_level()
