"""What balance losses are made of: how often each expert is chosen, how probable it is, how uneven that is."""

from collections.abc import Sequence

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
    places, n_sequences = _places(labels, n_labels, routing), routing.n_sequences
    counts = torch.bincount(places, minlength=n_sequences * (n_labels + 1))
    return counts.view(n_sequences, n_labels + 1)[:, 1:]


def weight_by_sequence(routing: Routing) -> Float[Tensor, "B E"]:
    """The sum of the weights with which each sequence's real tokens chose each expert, before any is dropped."""
    places, n_sequences = _places(routing.experts, routing.n_experts, routing), routing.n_sequences
    weights = routing.assigned_weights.flatten()
    sums = weights.new_zeros(n_sequences * (routing.n_experts + 1))
    return sums.index_add(0, places, weights).view(n_sequences, -1)[:, 1:]


def _places(labels: Int[Tensor, "T K"], n_labels: int, routing: Routing) -> Int[Tensor, " TK"]:
    """Each label, from 1, on from where its sequence's row of n_labels + 1 starts; what counts for nothing is 0."""
    if routing.mask is not None:
        labels = labels.masked_fill(~routing.mask.unsqueeze(-1), -1)
    first = torch.arange(routing.n_sequences, device=labels.device).unsqueeze(-1) * (n_labels + 1)
    return (labels.reshape(routing.n_sequences, -1) + 1 + first).flatten()


def frequency(
    counts: Int[Tensor, "B X"], routing: Routing, scope: Scope, step: StepCount | None = None
) -> Float[Tensor, "G X"]:
    """`counts` per real token of the scope: a row for each sequence, or one row. It has no gradient."""
    if scope == "batch" and step is not None:
        return (step.counts.float() / step.tokens).unsqueeze(0)
    return _over_scope(counts.float(), routing, scope)


def relative_load(
    counts: Int[Tensor, "B X"], pools: Sequence[int], scope: Scope, step: StepCount | None = None
) -> Float[Tensor, "G X"]:
    """f_i = N counts_i / sum of counts, 1 where all are equal: N / (K T) counts_i where every token takes K.

    N and the sum are those of the expert's pool.
    """
    if scope == "batch" and step is not None:
        counts = step.counts.unsqueeze(0)
    elif scope != "sequence":
        counts = counts.sum(dim=0, keepdim=True)
    parts = counts.float().split(list(pools), dim=-1)
    return torch.cat([part.shape[-1] * part / part.sum(dim=-1, keepdim=True).clamp_min(1) for part in parts], dim=-1)


def share(routing: Routing, pools: Sequence[int]) -> Float[Tensor, "T E"]:
    """s'_i: an expert's share in the token's scores of its pool (arXiv 2412.19437, eq 19); 0 at padding.

    Softmax scores sum to 1 and are their own shares (arXiv 2401.06066, eq 14).
    """
    parts = routing.scores.split(list(pools), dim=-1)
    found = torch.cat([part / part.sum(dim=-1, keepdim=True).clamp_min(1e-20) for part in parts], dim=-1)
    return found if routing.mask is None else found * routing.mask.unsqueeze(-1)


def probability(routing: Routing, pools: Sequence[int], scope: Scope) -> Float[Tensor, "G E"]:
    """P_i: the mean of s'_i over tokens (arXiv 2412.19437, eq 20). Over all pools, which count alike, they sum to 1."""
    return _over_scope(sum_by_sequence(share(routing, pools), routing) / len(pools), routing, scope)


def sum_by_sequence(values: Float[Tensor, "T X"], routing: Routing) -> Float[Tensor, "B X"]:
    """The sum over each sequence's tokens; padding must be 0."""
    return values.unflatten(0, (routing.n_sequences, -1)).sum(dim=1)


def mean_over_scope(terms: Float[Tensor, " G"], routing: Routing, scope: Scope) -> Float[Tensor, ""]:
    """The mean of one term for each sequence, or the only term there is.

    Sequences count by their real tokens, so that padding counts for nothing and the losses of micro-batches, each by
    its share of the tokens, add up to that of the batch.
    """
    if scope != "sequence":
        return terms.sum()
    tokens = real_tokens(routing)
    return (terms * tokens).sum() / tokens.sum().clamp_min(1)


def mean_over_tokens(terms: Float[Tensor, " T"], routing: Routing) -> Float[Tensor, ""]:
    """The mean of one term for each token over real tokens."""
    if routing.mask is not None:
        terms = terms * routing.mask
    return terms.sum() / real_tokens(routing).sum().clamp_min(1)


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
