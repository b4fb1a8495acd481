"""Several linear layers with the same few rows, in one compiled call."""

from collections.abc import Sequence
from struct import Struct

import torch

from moekit.kernels.library import library
from moekit.kernels.linear import Linear, in_one_call, listened, place_of
from moekit.tensors import Float, Tensor

PRODUCT = Struct("=QqqqiiQQq")
"""How `moekit_product` of products.h lies in memory."""

Described = tuple[int, int, int, int, int, int, int]
"""A matrix's place, and the address of its bias (0: none)."""


def products(
    x: Float[Tensor, "*shape I"], layers: Sequence[Linear], dtype: torch.dtype
) -> list[Float[Tensor, "*shape _"]] | None:
    """x W^T + b of each layer, in `dtype`; None where the compiled call would not compute what the layers do: for few
    rows, without gradients, on a CPU, and where nothing listens, it does."""
    compiled, shape = library(), x.shape[:-1]
    rows = x.numel() // max(x.shape[-1], 1)
    if compiled is None or not in_one_call(x, rows) or dtype not in (torch.bfloat16, torch.float32):
        return None
    jobs, found = [], []
    for layer in layers:
        place = described(layer, x.dtype)
        if place is None:
            return None
        y = torch.empty(*shape, place[1], dtype=dtype)
        jobs.append(packed(place, x.dtype, y.data_ptr()))
        found.append(y)
    x = x.contiguous()
    types = (x.dtype == torch.bfloat16, dtype == torch.bfloat16)
    threads, level = torch.get_num_threads(), compiled.moekit_level()
    compiled.moekit_products(b"".join(jobs), len(jobs), x.data_ptr(), rows, *types, threads, level)
    return found


def described(layer: Linear, dtype: torch.dtype) -> Described | None:
    """Where matrix and bias of a layer lie, for compiled products with rows of `dtype`; None where they would not be
    the layer's."""
    place = None if listened(layer) else place_of(layer.weight, layer.groups, dtype)
    bias = layer.bias
    if place is None or bias is None:
        return None if place is None else (*place, 0)
    return (*place, bias.data_ptr()) if bias.dtype == dtype and bias.is_contiguous() else None


def packed(place: Described, dtype: torch.dtype, y: int = 0) -> bytes:
    """The product as compiled code takes it: its bias is of `dtype`, its result goes to address `y`."""
    return PRODUCT.pack(*place, y, dtype == torch.bfloat16)
