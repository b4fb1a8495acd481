"""The two factors of every balance loss: how often each expert is chosen, and how probable each expert is."""

import torch

from moekit.config.balance import Scope
from moekit.moe.balance.rule import StepCount
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


def chosen(experts: Int[Tensor, "T K"], routing: Routing) -> Int[Tensor, "B E"]:
    """How many real tokens of each sequence chose each expert; `experts` may be those of another rule."""
    return count_by_sequence(experts, routing.n_experts, routing)


def count_by_sequence(labels: Int[Tensor, "T K"], n_labels: int, routing: Routing) -> Int[Tensor, "B X"]:
    """Occurrences of each label 0..n_labels - 1 in each sequence's real tokens; -1 is not counted."""
    if routing.mask is not None:
        labels = labels.masked_fill(~routing.mask.unsqueeze(-1), -1)
    n_sequences, width = routing.n_sequences, n_labels + 1
    first = torch.arange(n_sequences, device=labels.device).unsqueeze(-1) * width
    place = labels.reshape(n_sequences, -1) + 1 + first
    counts = torch.bincount(place.flatten(), minlength=n_sequences * width)
    return counts.view(n_sequences, width)[:, 1:]


def frequency(
    counts: Int[Tensor, "B X"], routing: Routing, scope: Scope, step: StepCount | None = None
) -> Float[Tensor, "G X"]:
    """`counts` per real token of the scope: a row for each sequence, or one row. It has no gradient."""
    if scope == "batch" and step is not None:
        return (step.counts.float() / step.tokens).unsqueeze(0)
    return _over_scope(counts.float(), routing, scope)


def relative_load(counts: Int[Tensor, "B X"], scope: Scope, step: StepCount | None = None) -> Float[Tensor, "G X"]:
    """f_i = N counts_i / sum of counts, 1 where all are equal: N / (K T) counts_i where every token takes K."""
    if scope == "batch" and step is not None:
        counts = step.counts.unsqueeze(0)
    elif scope != "sequence":
        counts = counts.sum(dim=0, keepdim=True)
    return counts.shape[-1] * counts.float() / counts.sum(dim=-1, keepdim=True).clamp_min(1)


def probability(routing: Routing, scope: Scope) -> Float[Tensor, "G E"]:
    """P_i: the mean over tokens of expert i's share in the token's scores (arXiv 2412.19437, eqs 19-20).

    Softmax scores sum to 1 and are their own shares (arXiv 2401.06066, eq 14).
    """
    share = routing.scores / routing.scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    if routing.mask is not None:
        share = share * routing.mask.unsqueeze(-1)
    return _over_scope(share.unflatten(0, (routing.n_sequences, -1)).sum(dim=1), routing, scope)


def mean_over_scope(terms: Float[Tensor, " G"], routing: Routing, scope: Scope) -> Float[Tensor, ""]:
    """The mean of one term for each sequence, or the only term there is.

    Sequences count by their real tokens, so that padding counts for nothing and the losses of micro-batches, each by
    its share of the tokens, add up to that of the batch.
    """
    if scope != "sequence":
        return terms.sum()
    tokens = real_tokens(routing)
    return (terms * tokens).sum() / tokens.sum().clamp_min(1)


def real_tokens(routing: Routing) -> Int[Tensor, " B"]:
    """Real tokens of each sequence."""
    n_tokens = routing.experts.shape[0]
    if routing.mask is None:
        length = n_tokens // routing.n_sequences
        return torch.full((routing.n_sequences,), length, device=routing.experts.device)
    return routing.mask.view(routing.n_sequences, -1).sum(dim=1)


def _over_scope(sums: Float[Tensor, "B X"], routing: Routing, scope: Scope) -> Float[Tensor, "G X"]:
    tokens = real_tokens(routing)
    if scope != "sequence":
        sums, tokens = sums.sum(dim=0, keepdim=True), tokens.sum(dim=0, keepdim=True)
    return sums / tokens.clamp_min(1).unsqueeze(-1)
