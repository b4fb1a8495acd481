"""The rows of a routing by expert in compiled code."""

from typing import NamedTuple

import torch

from moekit.kernels.library import library
from moekit.tensors import Int, Tensor


class ByExpert(NamedTuple):
    """Rows sorted by expert, by token within it: whose each is, the row of each place (R: none), and where the rows of
    each expert begin and end."""

    tokens: Int[Tensor, " R"]
    rows: Int[Tensor, "T K"]
    bounds: tuple[int, ...]


def by_expert(experts: Int[Tensor, "T K"], n_experts: int) -> ByExpert | None:
    """The places of `experts` that are not -1; None where there is no compiled code for them.

    Raises ValueError for a number that is no expert's.
    """
    compiled = library() if experts.device.type == "cpu" else None
    if compiled is None:
        return None
    experts = experts.contiguous()
    tokens, rows = torch.empty(experts.numel(), dtype=torch.long), torch.empty_like(experts)
    limits = torch.empty(n_experts + 1, dtype=torch.long)
    places = (each.data_ptr() for each in (tokens, rows, limits))
    sizes = experts.numel(), experts.shape[-1], n_experts
    if not compiled.moekit_by_expert(experts.data_ptr(), *sizes, *places, torch.get_num_threads()):
        raise ValueError(f"a routing must name experts 0 to {n_experts - 1}, or -1 for an empty place")
    bounds = tuple(limits.tolist())
    return ByExpert(tokens[: bounds[-1]], rows, bounds)
