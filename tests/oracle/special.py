"""Hash, task and projection routing: one token at a time, over lists."""

import torch
import torch.nn.functional as F
from torch import Tensor

from oracle.gates import best, softmax


def balanced_table(counts: list[float], before: list[list[int]], n_experts: int) -> list[list[int]]:
    """arXiv 2106.04426, section 3.2: the most frequent id first, each to the emptiest experts; unseen ids stay."""
    table = [list(experts) for experts in before]
    load = [0.0] * n_experts
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        if counts[token] > 0:
            emptiest = sorted(range(n_experts), key=lambda expert: (load[expert], expert))
            table[token] = emptiest[: len(before[token])]
            for expert in table[token]:
                load[expert] += counts[token]
    return table


def hash_gates(experts: list[int], n_experts: int) -> list[Tensor]:
    """The mean of the experts that stand in the table."""
    return [torch.tensor(float(i in experts) / len(experts)) for i in range(n_experts)]


def task_gates(
    logits: list[Tensor], bias: list[float], task: int, n_common: int, owned: int, top_k: int, renormalise: bool
) -> list[Tensor]:
    """Softmax over the common experts and those of the task, the best (with the bias) of them; 0 elsewhere."""
    reach = [*range(n_common), *range(n_common + task * owned, n_common + (task + 1) * owned)]
    scores = softmax([logits[i] for i in reach])
    chosen = best([score + bias[i] for score, i in zip(scores, reach, strict=True)], top_k)
    total = sum(scores[place] for place in chosen) if renormalise else 1
    gates = [0 * logit for logit in logits]
    for place in chosen:
        gates[reach[place]] = scores[place] / total
    return gates


def projection_gates(logits: list[Tensor], bias: list[float], top_k: int, renormalise: bool) -> list[list[Tensor]]:
    """The gates of the gate matrices, of the up matrices, and of the down matrices."""
    size = len(logits) // 3
    parts = []
    for first in (0, size, 2 * size):
        own = range(first, first + size)
        parts.append(task_gates([logits[i] for i in own], [bias[i] for i in own], 0, size, 0, top_k, renormalise))
    return parts


def mixed_expert(u: Tensor, gates: list[list[Tensor]], gate_up: Tensor, down: Tensor) -> Tensor:
    """h = silu(sum_i w_i G_i u) * (sum_j w_j U_j u), y = sum_k w_k D_k h."""
    inner = gate_up.shape[1] // 2
    gate = sum(w * (matrix[:inner] @ u) for w, matrix in zip(gates[0], gate_up, strict=True))
    up = sum(w * (matrix[inner:] @ u) for w, matrix in zip(gates[1], gate_up, strict=True))
    h = F.silu(gate) * up
    return sum(w * (matrix @ h) for w, matrix in zip(gates[2], down, strict=True))
