"""Group the rows of a routing by expert, without copying a weight or dropping a token."""

from typing import NamedTuple

import torch

from moekit.moe.routing import Routing
from moekit.tensors import Int, Tensor


class Dispatch(NamedTuple):
    """Which row goes where: R served rows sorted by expert, `rows[e]:rows[e + 1]` for expert e.

    `slots` numbers the T * K places of the routing; `slots // K` is the token. `inverse` leads from a place to its
    row, R where the place is empty.
    """

    slots: Int[Tensor, " R"]
    tokens: Int[Tensor, " R"]
    inverse: Int[Tensor, "T K"]
    rows: tuple[int, ...]


def dispatch(routing: Routing) -> Dispatch:
    """Sort the served places of `routing` by expert; within an expert, by token."""
    n_experts, (n_tokens, top_k) = routing.n_experts, routing.experts.shape
    expert = routing.experts if routing.kept is None else routing.experts.masked_fill(~routing.kept, -1)
    flat = expert.flatten()
    # Empty places (-1) sort to the end, as if for an expert number E.
    order = flat.remainder(n_experts + 1).argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=n_experts + 1)[1:]
    rows = (0, *counts.cumsum(0).tolist())
    served = rows[-1]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device).clamp_max_(served)
    slots = order[:served]
    return Dispatch(slots, slots // top_k, inverse.view(n_tokens, top_k), rows)
