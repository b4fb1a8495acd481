"""The balance losses as the papers write them, over the T tokens of one sequence or batch.

`choices[t]` lists the experts that token t selects, `scores[t][i]` is s_it. Padding is left out by the caller. Where
there are several pools of choices, the caller gives the lists of one pool, and takes the mean over pools.
"""

import math

from torch import Tensor

Choices = list[list[int]]
Scores = list[list[Tensor]]


def frequencies(choices: Choices, n_experts: int) -> list[float]:
    """f_i = N' / (K' T) sum_t 1(token t selects expert i) (arXiv 2401.06066, eq 13); K' T is how many are selected."""
    places = sum(len(chosen) for chosen in choices)
    return [n_experts / max(places, 1) * sum(i in chosen for chosen in choices) for i in range(n_experts)]


def probabilities(scores: Scores) -> list[Tensor]:
    """P_i = 1 / T sum_t s'_it with s'_it = s_it / sum_j s_jt (arXiv 2412.19437, eqs 19-20).

    Softmax scores sum to 1, and this is arXiv 2401.06066, eq 14.
    """
    n_tokens, n_experts = len(scores), len(scores[0])
    return [sum(token[i] / sum(token) for token in scores) / n_tokens for i in range(n_experts)]


def expert_loss(choices: Choices, scores: Scores, coefficient: float) -> Tensor:
    """a1 sum_i f_i P_i (arXiv 2401.06066, eqs 12-14)."""
    f, p = frequencies(choices, len(scores[0])), probabilities(scores)
    return coefficient * sum(f_i * p_i for f_i, p_i in zip(f, p, strict=True))


def device_loss(choices: Choices, scores: Scores, n_devices: int, coefficient: float) -> Tensor:
    """a2 sum_i f'_i P'_i: f' the mean of f over a device's experts, P' the sum of P (arXiv 2401.06066, eqs 15-17)."""
    n_experts = len(scores[0])
    size = n_experts // n_devices
    f, p = frequencies(choices, n_experts), probabilities(scores)
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
    return expert_loss(choices, scores, coefficient)


def z_loss(logits: Scores, coefficient: float) -> Tensor:
    """c_z / T sum_t (log sum_i exp(x_it))^2 (arXiv 2202.08906, eq 5)."""
    return coefficient * sum(sum(x.exp() for x in token).log() ** 2 for token in logits) / len(logits)


def first_choice_loss(scores: Scores, coefficient: float) -> Tensor:
    """alpha N sum_i f_i P_i, f_i = 1 / T sum_t 1(argmax s_t = i) (arXiv 2101.03961, eqs 4-6)."""
    n_tokens, n_experts = len(scores), len(scores[0])
    first = [max(range(n_experts), key=lambda i, token=token: token[i]) for token in scores]
    f, p = [sum(choice == i for choice in first) / n_tokens for i in range(n_experts)], probabilities(scores)
    return coefficient * n_experts * sum(f_i * p_i for f_i, p_i in zip(f, p, strict=True))


def squared_variation(values: list[Tensor]) -> Tensor:
    """CV^2 = variance / mean^2, the variance that of a population."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def importance_loss(choices: Choices, weights: Scores, n_experts: int, coefficient: float) -> Tensor:
    """w (1 + CV(Importance)^2), Importance_i = sum_t G(x_t)_i (arXiv 1701.06538, eqs 6-7)."""
    importance = [0.0] * n_experts
    for chosen, own in zip(choices, weights, strict=True):
        for expert, weight in zip(chosen, own, strict=False):
            importance[expert] = importance[expert] + weight
    return coefficient * (1 + squared_variation(importance))


def load_loss(clean: Scores, noisy: Scores, deviation: Scores, k: int, coefficient: float) -> Tensor:
    """w (1 + CV(Load)^2), Load_i = sum_t Phi((clean_ti - kth_excluding(H_t, k, i)) / deviation_ti) (eqs 8-11)."""
    load = [0.0] * len(clean[0])
    for token, (h, spread) in zip(clean, zip(noisy, deviation, strict=True), strict=True):
        for i, value in enumerate(token):
            others = sorted((h[j] for j in range(len(h)) if j != i), reverse=True)
            phi = (1 + ((value - others[k - 1]) / spread[i] / math.sqrt(2)).erf()) / 2
            load[i] = load[i] + phi
    return coefficient * (1 + squared_variation(load))


def variance_loss(scores: Scores, coefficient: float) -> Tensor:
    """alpha (1 + N^2 Var(P)), P_i = 1 / T sum_t s'_it."""
    p = probabilities(scores)
    variance = sum((p_i - 1 / len(p)) ** 2 for p_i in p) / len(p)
    return coefficient * (1 + len(p) ** 2 * variance)


def entropy_loss(scores: Scores, coefficient: float) -> Tensor:
    """alpha / T sum_t -sum_i P_ti log P_ti (arXiv 2403.07652)."""
    shares = [[value / sum(token) for value in token] for token in scores]
    return coefficient * sum(-sum(p * p.log() for p in token) for token in shares) / len(scores)


def common_mass_loss(scores: Scores, n_common: int, coefficient: float) -> Tensor:
    """alpha / T sum_t (sum of s_ti over common experts i) / (sum over all)."""
    return coefficient * sum(sum(token[:n_common]) / sum(token) for token in scores) / len(scores)


def bias_step(bias: list[float], load: list[int], rate: float, update: str, centred: bool) -> list[float]:
    """The selection bias of one pool after a step with this load (arXiv 2408.15664, Algorithm 1 and section 4.3)."""
    mean, moved = sum(load) / len(load), []
    for b, count in zip(bias, load, strict=True):
        error = mean - count
        if update == "proportional":
            moved.append(b + rate * (error / mean if mean else 0.0))
        else:
            moved.append(b + rate * ((error > 0) - (error < 0)))
    offset = sum(moved) / len(moved) if centred else 0.0
    return [b - offset for b in moved]


def max_violation(load: list[int]) -> float:
    """MaxVio = (max_i Load_i - mean) / mean (arXiv 2408.15664, eq 4)."""
    mean = sum(load) / len(load)
    return (max(load) - mean) / mean


def entropy(load: list[int]) -> float:
    """-sum_i p_i log p_i / log E with p_i the expert's share of the load."""
    shares = [count / sum(load) for count in load if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(load))
