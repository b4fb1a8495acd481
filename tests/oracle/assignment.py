"""Rules that look at several tokens at once, as the papers write them: loops over lists.

`scores[t][e]` is what token t thinks of expert e. Padding is left out by the caller.
"""

import math
from functools import cache

import torch
from torch import Tensor

from oracle.gates import best, softmax
from oracle.mixture import swiglu

Table = list[list[float]]


def largest_balanced_sum(scores: Table) -> float:
    """The best sum of scores over all assignments that give each expert floor(T / E) or ceil(T / E) tokens."""
    n_tokens, n_experts = len(scores), len(scores[0])
    few, many = n_tokens // n_experts, math.ceil(n_tokens / n_experts)

    @cache
    def rest(token: int, loads: tuple[int, ...]) -> float:
        if token == n_tokens:
            return 0.0 if min(loads) >= few else -math.inf
        sums = [
            scores[token][e] + rest(token + 1, (*loads[:e], loads[e] + 1, *loads[e + 1 :]))
            for e in range(n_experts)
            if loads[e] < many
        ]
        return max(sums, default=-math.inf)

    return rest(0, (0,) * n_experts)


def sinkhorn(logits: Table, rounds: int) -> Table:
    """d1 C d0 of Megatron-LM's router (megatron/core/transformer/moe/moe_utils.py), in so many rounds."""
    cost = [[math.exp(logit) for logit in token] for token in logits]
    n_tokens, n_experts = len(cost), len(cost[0])
    d1 = [1.0] * n_experts
    for _ in range(rounds):
        d0 = [1 / n_tokens / sum(d1[e] * token[e] for e in range(n_experts)) for token in cost]
        d1 = [1 / n_experts / sum(d0[t] * cost[t][e] for t in range(n_tokens)) for e in range(n_experts)]
    return [[d0[t] * cost[t][e] * d1[e] for e in range(n_experts)] for t in range(n_tokens)]


def n_taken(scores: Table, top_k: int) -> int:
    """Tokens that an expert takes: k = n c / e (arXiv 2202.09368, section 3.2), rounded up."""
    return math.ceil(len(scores) * top_k / len(scores[0]))


def best_tokens_of(scores: Table, expert: int, top_k: int) -> list[int]:
    return best([token[expert] for token in scores], n_taken(scores, top_k))


def expert_choice(scores: Table, top_k: int) -> list[set[int]]:
    """The experts of each token where each expert takes its best tokens (arXiv 2202.09368, eq 2)."""
    chosen: list[set[int]] = [set() for _ in scores]
    for expert in range(len(scores[0])):
        for token in best_tokens_of(scores, expert, top_k):
            chosen[token].add(expert)
    return chosen


def lowest_taken(scores: Table, top_k: int) -> list[float]:
    """The lowest score that each expert takes."""
    return [min(scores[t][e] for t in best_tokens_of(scores, e, top_k)) for e in range(len(scores[0]))]


def above_thresholds(token: list[float], thresholds: list[float], most: int) -> set[int]:
    """The experts of one token that goes by itself: its best, and those whose threshold it reaches, `most` at most."""
    first = best(token, 1)[0]
    reached = [e for e in range(len(token)) if token[e] >= thresholds[e] or e == first]
    return {reached[place] for place in best([token[e] for e in reached], most)}


def token_choice(scores: Table, top_k: int) -> list[set[int]]:
    return [set(best(token, top_k)) for token in scores]


def demand(scores: Table, top_k: int) -> list[float]:
    """How many tokens ask for each expert, relative to the mean."""
    asked = token_choice(scores, top_k)
    n_experts = len(scores[0])
    return [sum(e in one for one in asked) / (len(scores) * top_k / n_experts) for e in range(n_experts)]


def hybrid(scores: Table, top_k: int, chooses: list[bool]) -> list[set[int]]:
    """Experts that choose take their best tokens, the others the tokens that ask for them."""
    asked, taken = token_choice(scores, top_k), expert_choice(scores, top_k)
    return [
        {e for e in range(len(chooses)) if e in (by_expert if chooses[e] else by_token)}
        for by_token, by_expert in zip(asked, taken, strict=True)
    ]


def soft_mixture(x: Tensor, phi: Tensor, scale: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Soft MoE on one sequence (arXiv 2308.00951, eqs 1-3 and Algorithm 2), slot by slot and token by token."""

    def l2_normalised(v: Tensor) -> Tensor:
        return v / (v.square().sum().sqrt() + 1e-6)

    tokens, slots = range(len(x)), range(len(phi))
    logits = [[l2_normalised(x[t]) @ (scale * l2_normalised(phi[s])) for s in slots] for t in tokens]
    mixed = []
    for s in slots:
        to_slot = softmax([logits[t][s] for t in tokens])
        expert = s * len(gate_up) // len(phi)
        mixed.append(swiglu(sum(to_slot[t] * x[t] for t in tokens), gate_up[expert], down[expert]))
    rows = []
    for t in tokens:
        from_slots = softmax(logits[t])
        rows.append(sum(from_slots[s] * mixed[s] for s in slots))
    return torch.stack(rows)
