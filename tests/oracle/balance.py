"""The balance losses as the papers write them, over the T tokens of one sequence or batch.

`choices[t]` lists the experts that token t selects, `scores[t][i]` is s_it. Padding is left out by the caller.
"""

import math

from torch import Tensor

Choices = list[list[int]]
Scores = list[list[Tensor]]


def frequencies(choices: Choices, n_experts: int, top_k: int) -> list[float]:
    """f_i = N' / (K' T) sum_t 1(token t selects expert i) (arXiv 2401.06066, eq 13)."""
    n_tokens = len(choices)
    return [n_experts / (top_k * n_tokens) * sum(i in chosen for chosen in choices) for i in range(n_experts)]


def probabilities(scores: Scores) -> list[Tensor]:
    """P_i = 1 / T sum_t s'_it with s'_it = s_it / sum_j s_jt (arXiv 2412.19437, eqs 19-20).

    Softmax scores sum to 1, and this is arXiv 2401.06066, eq 14.
    """
    n_tokens, n_experts = len(scores), len(scores[0])
    return [sum(token[i] / sum(token) for token in scores) / n_tokens for i in range(n_experts)]


def expert_loss(choices: Choices, scores: Scores, top_k: int, coefficient: float) -> Tensor:
    """a1 sum_i f_i P_i (arXiv 2401.06066, eqs 12-14)."""
    f, p = frequencies(choices, len(scores[0]), top_k), probabilities(scores)
    return coefficient * sum(f_i * p_i for f_i, p_i in zip(f, p, strict=True))


def device_loss(choices: Choices, scores: Scores, top_k: int, n_devices: int, coefficient: float) -> Tensor:
    """a2 sum_i f'_i P'_i: f' the mean of f over a device's experts, P' the sum of P (arXiv 2401.06066, eqs 15-17)."""
    n_experts = len(scores[0])
    size = n_experts // n_devices
    f, p = frequencies(choices, n_experts, top_k), probabilities(scores)
    total = 0
    for device in range(n_devices):
        own = range(device * size, (device + 1) * size)
        total = total + sum(f[j] for j in own) / size * sum(p[j] for j in own)
    return coefficient * total


def communication_loss(
    choices: Choices, scores: Scores, n_devices: int, max_devices: int, coefficient: float
) -> Tensor:
    """a3 sum_i f''_i P''_i, f''_i = D / (M T) sum_t 1(token t is sent to device i) (arXiv 2405.04434, eqs 29-31)."""
    n_tokens, size = len(choices), len(scores[0]) // n_devices
    p = probabilities(scores)
    total = 0
    for device in range(n_devices):
        own = range(device * size, (device + 1) * size)
        sent = sum(any(j in own for j in chosen) for chosen in choices)
        total = total + n_devices / (max_devices * n_tokens) * sent * sum(p[j] for j in own)
    return coefficient * total


def sequence_loss(scores: Scores, top_k: int, coefficient: float) -> Tensor:
    """alpha sum_i f_i P_i, where the selection is that of the scores alone (arXiv 2412.19437, eqs 17-20)."""
    choices = [sorted(range(len(token)), key=lambda i: token[i], reverse=True)[:top_k] for token in scores]
    return expert_loss(choices, scores, top_k, coefficient)


def z_loss(logits: Scores, coefficient: float) -> Tensor:
    """c_z / T sum_t (log sum_i exp(x_it))^2 (arXiv 2202.08906, eq 5)."""
    return coefficient * sum(sum(x.exp() for x in token).log() ** 2 for token in logits) / len(logits)


def max_violation(load: list[int]) -> float:
    """MaxVio = (max_i Load_i - mean) / mean (arXiv 2408.15664, eq 4)."""
    mean = sum(load) / len(load)
    return (max(load) - mean) / mean


def entropy(load: list[int]) -> float:
    """-sum_i p_i log p_i / log E with p_i the expert's share of the load."""
    shares = [count / sum(load) for count in load if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(load))
