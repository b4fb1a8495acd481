"""State that follows the load: tensors without gradient that stay float32 in every model."""

from collections.abc import Callable

import torch
from torch import nn

from moekit.tensors import Tensor


class Float32State(nn.Module):
    """A module whose parameters without gradient keep float32 when the model takes another type.

    They are parameters, not buffers, as the selection bias is in released checkpoints, whose counts include it. In
    bfloat16 a bias of 0.5 could not move by 0.001.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32State":
        before = {name: p.detach() for name, p in self.named_parameters(recurse=False) if not p.requires_grad}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old.dtype == torch.float32 != new.dtype:
                kept = torch.empty_like(new, dtype=torch.float32) if old.is_meta else old.to(new.device)
                setattr(self, name, nn.Parameter(kept, requires_grad=False))
        return self


def state(values: Tensor) -> nn.Parameter:
    """`values` as a parameter without gradient."""
    return nn.Parameter(values, requires_grad=False)
