"""Balanced assignment: one expert for each token, equally many tokens for each expert, the largest sum of scores.

Bertsekas' auction for transportation problems (Bertsekas and Castanon 1989), all unplaced tokens bidding at once. Each
expert has ceil(T / E) places. Blank tokens, which score 0 everywhere, take the places that are too many; an expert
holds at most one blank, so that it serves floor(T / E) or ceil(T / E) tokens.
"""

import torch

from moekit.tensors import Float, Int, Tensor

COARSE = 0.02
"""Epsilon of the first auction, relative to the spread of the scores, as in the authors' released code."""

ROUNDS = 1000
"""Rounds of bids in one auction; tokens that are still unplaced then are placed greedily."""


@torch.no_grad()
def balanced_assignment(scores: Float[Tensor, "T E"], accuracy: float = COARSE) -> Int[Tensor, " T"]:
    """The expert of each token. The same scores always lead to the same assignment.

    The sum of the chosen scores lies within (T + E) * epsilon of the best possible, where epsilon is `accuracy` times
    the difference of the largest and the smallest score, unless `ROUNDS` rounds did not suffice.
    """
    n_tokens, n_experts = scores.shape
    if n_tokens == 0 or n_experts == 1:
        return torch.zeros(n_tokens, dtype=torch.long, device=scores.device)
    scores = scores.float().nan_to_num(0.0, 1e30, -1e30)
    table = torch.cat([scores, scores.new_zeros(-n_tokens % n_experts, n_experts)])
    spread = scores.max() - scores.min()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    # With the mean scores as prices, all experts are equally wanted; a finer auction starts from a coarse one's prices.
    price, epsilon = scores.mean(dim=0), max(COARSE, accuracy)
    owner = _auction(table, n_tokens, price, spread * epsilon)
    while epsilon > accuracy:
        epsilon = max(epsilon / 8, accuracy)
        owner = _auction(table, n_tokens, price, spread * epsilon)
    return owner[:n_tokens] if bool((owner >= 0).all()) else _completed(scores, owner[:n_tokens])


def _auction(
    table: Float[Tensor, "N E"], n_tokens: int, price: Float[Tensor, " E"], epsilon: Float[Tensor, ""]
) -> Int[Tensor, " N"]:
    """The expert of each row, -1 if none; the rows from `n_tokens` on are blanks. `price` changes in place.

    An expert's price is the lowest bid among its places once all are held. An unplaced row bids for the expert that is
    worth most to it, score - price, as much as leaves it `epsilon` less than its second best; the highest bids hold an
    expert's places. So a placed row is always within epsilon of its best choice, from which the bound follows.
    """
    n_rows, n_experts = table.shape
    room = n_rows // n_experts
    owner, bids = torch.full((n_rows,), -1, device=table.device), table.new_zeros(n_rows)
    for _ in range(ROUNDS):
        bidders = (owner < 0).nonzero().flatten()
        if not len(bidders):
            break
        cost = price
        if n_rows > n_tokens:
            # A blank must outbid the blank that an expert holds.
            held = (owner[n_tokens:] >= 0).nonzero().flatten() + n_tokens
            cost = torch.stack([price, price.index_copy(0, owner[held], bids[held])])[(bidders >= n_tokens).long()]
        best = (table[bidders] - cost).topk(2, dim=-1)
        chosen = best.indices[:, 0]
        owner[bidders] = chosen
        bids[bidders] = table[bidders, chosen] - best.values[:, 1] + epsilon
        if n_rows > n_tokens:
            rows, rank = _ranked(owner, bids, (owner[n_tokens:] >= 0).nonzero().flatten() + n_tokens)
            owner[rows[rank > 0]] = -1
        contested = torch.zeros(n_experts + 1, dtype=torch.bool, device=table.device).index_fill_(0, chosen, True)
        rows, rank = _ranked(owner, bids, contested[owner].nonzero().flatten())
        last = rows[rank == room - 1]
        price[owner[last]] = bids[last]
        owner[rows[rank >= room]] = -1
    return owner


def _ranked(
    owner: Int[Tensor, " N"], bids: Float[Tensor, " N"], rows: Int[Tensor, " M"]
) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """The rows by expert, highest bid first, and the place of each within its expert, from 0."""
    rows = rows[bids[rows].argsort(descending=True, stable=True)]
    rows = rows[owner[rows].argsort(stable=True)]
    groups = owner[rows]
    return rows, torch.arange(len(rows), device=rows.device) - torch.searchsorted(groups, groups)


def _completed(scores: Float[Tensor, "T E"], owner: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """The assignment without the tokens that are too many, and these at their best experts with room."""
    n_tokens, n_experts = scores.shape
    room = torch.full((n_experts,), n_tokens // n_experts, device=scores.device)
    load = torch.bincount(owner + 1, minlength=n_experts + 1)[1:]
    room[load.topk(n_tokens % n_experts).indices] += 1
    bids = scores.gather(-1, owner.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    for _ in range(n_experts + 1):
        # Each time round, every expert that is asked for more than it has room for is full afterwards.
        placed = (owner >= 0).nonzero().flatten()
        rows, rank = _ranked(owner, bids, placed)
        owner[rows[rank >= room[owner[rows]]]] = -1
        bids[owner >= 0] = torch.inf
        free = (owner < 0).nonzero().flatten()
        if not len(free):
            break
        full = torch.bincount(owner + 1, minlength=n_experts + 1)[1:] >= room
        best = scores[free].masked_fill(full, -torch.inf).max(dim=-1)
        owner[free], bids[free] = best.indices, best.values
    return owner
