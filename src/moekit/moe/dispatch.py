"""Group the rows of a routing by expert, without copying a weight or dropping a token."""

from typing import NamedTuple

import torch

from moekit.kernels.by_expert import by_expert
from moekit.moe.routing import Routing
from moekit.tensors import Int, Tensor


class Dispatch(NamedTuple):
    """Which row goes where: R rows sorted by expert, `bounds[e]:bounds[e + 1]` for expert e, by token within it.

    Each expert's rows may end with padding, so that their number is a multiple of a panel (see `panel`).
    `tokens` names the token of a row (any, for padding), `rows` the row of a place in the routing (R: an empty place).
    """

    tokens: Int[Tensor, " R"]
    rows: Int[Tensor, "T K"]
    padding: Int[Tensor, " P"]
    bounds: tuple[int, ...]
    full: bool

    @property
    def n_rows(self) -> int:
        """R: served places and padding."""
        return self.bounds[-1]


def dispatch(routing: Routing, multiple: int | None = None) -> Dispatch:
    """Sort the served places of `routing` by expert, each expert's padded to `multiple` rows (default: `panel`)."""
    n_experts, served = routing.n_experts, routing.experts if routing.served is None else routing.served
    found = by_expert(served, n_experts) if multiple == 1 else None
    if found is None:
        return sorted_rows(served, n_experts, multiple)
    return Dispatch(found.tokens, found.rows, found.tokens[:0], found.bounds, len(found.tokens) == served.numel())


def sorted_rows(experts: Int[Tensor, "T K"], n_experts: int, multiple: int | None) -> Dispatch:
    """As `dispatch`, of the experts that serve each token, in plain torch."""
    (n_tokens, top_k), flat = experts.shape, experts.flatten()
    # Empty places (-1) sort to the end, as if for an expert number E.
    order = flat.remainder(n_experts + 1).argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=n_experts + 1)[1:]
    served = counts.tolist()
    size = panel(sum(served), n_experts) if multiple is None else multiple
    padded = [-(-count // size) * size for count in served]
    bounds = _sums(padded)
    shift = torch.tensor([start - first for start, first in zip(bounds, _sums(served), strict=True)][:-1])
    places = order[: sum(served)]
    target = torch.arange(len(places), device=flat.device)
    target += shift.to(flat.device).repeat_interleave(counts, output_size=len(places))
    rows = torch.full_like(flat, bounds[-1]).index_copy_(0, places, target)
    tokens = torch.full((bounds[-1],), -1, device=flat.device).index_copy_(0, target, places // top_k)
    padding = (tokens < 0).nonzero().flatten()
    return Dispatch(tokens.clamp_min_(0), rows.view(n_tokens, top_k), padding, bounds, sum(served) == flat.numel())


def everything(n_tokens: int) -> Dispatch:
    """Every token to the only expert."""
    tokens = torch.arange(n_tokens)
    return Dispatch(tokens, tokens.unsqueeze(-1), tokens[:0], (0, n_tokens), full=True)


def panel(n_rows: int, n_experts: int) -> int:
    """Rows that each expert's share is rounded up to: about 1/16 of the mean share, a power of two up to 64.

    The CPU's bfloat16 products are compiled anew for every new number of rows, which costs several times the product
    itself; rounding keeps the numbers few, at about 3 % more rows.
    """
    sixteenth = n_rows // (16 * n_experts)
    return 1 << min(max(sixteenth.bit_length() - 1, 0), 6)


def _sums(counts: list[int]) -> tuple[int, ...]:
    total, sums = 0, [0]
    for count in counts:
        total += count
        sums.append(total)
    return tuple(sums)
