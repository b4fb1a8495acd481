"""Linear layers as jobs of compiled code describe them."""

from struct import Struct

import torch

from moekit.kernels.linear import Linear, listened, place_of

PRODUCT = Struct("=QqqqiiQQq")
"""How `moekit_product` of products.h lies in memory."""

Described = tuple[int, int, int, int, int, int, int]
"""A matrix's place, and the address of its bias (0: none)."""


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
