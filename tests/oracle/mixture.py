"""A mixture-of-experts layer, one token and one expert at a time (arXiv 2401.06066, eq 9, without the residual)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gates = Callable[[list[Tensor]], list[Tensor]]


def swiglu(u: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert on one token: W_down (silu(W_gate u) * W_up u)."""
    half = gate_up.shape[0] // 2
    return down @ (F.silu(gate_up[:half] @ u) * (gate_up[half:] @ u))


def weighted_experts(u: Tensor, gates: list[Tensor], gate_up: Tensor, down: Tensor) -> Tensor:
    """The sum over the chosen experts of g_i FFN_i(u), for one token."""
    h = torch.zeros_like(u)
    for i, gate in enumerate(gates):
        if gate != 0:
            h = h + gate * swiglu(u, gate_up[i], down[i])
    return h


def mixture(x: Tensor, centroids: Tensor, gates: Gates, gate_up: Tensor, down: Tensor) -> Tensor:
    """The routed experts on each of T tokens, [T D]; `gates` is the router's rule for one token."""
    rows = [weighted_experts(u, gates([u @ e for e in centroids]), gate_up, down) for u in x]
    return torch.stack(rows) if rows else torch.zeros_like(x)


def served(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The output of a routing that is already decided: place by place, skipping empty ones (-1)."""
    rows = []
    for t, u in enumerate(x):
        h = torch.zeros_like(u)
        for expert, weight in zip(experts[t].tolist(), weights[t], strict=True):
            if expert >= 0:
                h = h + weight * swiglu(u, gate_up[expert], down[expert])
        rows.append(h)
    return torch.stack(rows) if rows else torch.zeros_like(x)
