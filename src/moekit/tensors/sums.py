"""Sums of tensors of two types."""

from moekit.tensors import Tensor

NUMBERS = 1 << 20
"""How many are added at once, at least a row."""


def add_(total: Tensor, part: Tensor) -> Tensor:
    """`total` += `part`, of the same shape; at once, torch would first turn the whole of `part` into `total`'s type."""
    if part.dtype == total.dtype or total.numel() <= NUMBERS:
        return total.add_(part)
    rows = max(NUMBERS * len(total) // total.numel(), 1)
    for own, other in zip(total.split(rows), part.split(rows), strict=True):
        own.add_(other)
    return total
