"""How far apart two results are, in units of the larger numbers among them."""

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected magnitude; nan where anything is nan."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)).item()
