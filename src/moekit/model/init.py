"""How every tensor of a model starts, in one function."""

import torch
from torch import nn

from moekit.model.norm import RMSNorm
from moekit.moe.selection import SelectionRule


@torch.no_grad()
def initialise(model: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Initialise in place.

    | tensor                                   | start            |
    |------------------------------------------|------------------|
    | embedding, head, every matrix, centroids | normal(0, std)   |
    | norms                                    | 1                |
    | biases                                   | 0                |
    | state without gradient, selection rules' | their own        |

    As in DeepSeek-V2 and V3 (std 0.006 in the papers; small models learn faster from 0.02). On the meta device
    nothing happens.
    """
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    for name, tensor in model.named_parameters():
        if tensor.is_meta or not tensor.requires_grad:
            continue
        if id(tensor) in norms:
            tensor.fill_(1.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.normal_(0.0, std, generator=generator)
    for module in model.modules():
        if isinstance(module, SelectionRule):
            module.start()
