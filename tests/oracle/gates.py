"""How one token chooses its experts, as each paper writes it.

Every function takes the token's affinity logits, one for each routed expert (u . e_i), and returns g_i for each
expert i: its weight, 0 where it is not chosen. Logits and gates are lists; the entries may be tensors with a gradient.
"""

from torch import Tensor


def softmax(logits: list[Tensor]) -> list[Tensor]:
    powers = [(logit - max(logits)).exp() for logit in logits]
    return [power / sum(powers) for power in powers]


def best(values: list[Tensor], k: int) -> list[int]:
    """The places of the k largest values."""
    return sorted(range(len(values)), key=lambda place: values[place], reverse=True)[:k]


def deepseek_moe_gates(logits: list[Tensor], top_k: int) -> list[Tensor]:
    """arXiv 2401.06066, eqs 10-11: softmax over the routed experts, then top-k; not renormalised."""
    scores = softmax(logits)
    chosen = best(scores, top_k)
    return [score if i in chosen else 0 * score for i, score in enumerate(scores)]


def deepseek_v2_gates(logits: list[Tensor], top_k: int, n_devices: int, max_devices: int, scale: float) -> list[Tensor]:
    """arXiv 2405.04434, eqs 20-22 and section 2.2.2: only the devices that hold the highest affinities take part."""
    scores = softmax(logits)
    experts_per_device = len(scores) // n_devices
    affinity = [max(scores[d * experts_per_device : (d + 1) * experts_per_device]) for d in range(n_devices)]
    devices = best(affinity, max_devices)
    allowed = [i for i in range(len(scores)) if i // experts_per_device in devices]
    chosen = [allowed[place] for place in best([scores[i] for i in allowed], top_k)]
    return [scale * score if i in chosen else 0 * score for i, score in enumerate(scores)]


def deepseek_v3_gates(
    logits: list[Tensor], bias: list[Tensor], top_k: int, n_nodes: int, max_nodes: int, scale: float, summed: int = 2
) -> list[Tensor]:
    """arXiv 2412.19437, eqs 12-16 and section 2.1.2: the bias enters every choice and no weight.

    A node is worth the sum of its `summed` highest (biased) affinities: K_r / M in the paper, 2 in the code.
    """
    scores = [logit.sigmoid() for logit in logits]
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    experts_per_node = len(scores) // n_nodes
    worth = [
        sum(sorted(biased[n * experts_per_node : (n + 1) * experts_per_node], reverse=True)[:summed])
        for n in range(n_nodes)
    ]
    nodes = best(worth, max_nodes)
    allowed = [i for i in range(len(scores)) if i // experts_per_node in nodes]
    chosen = [allowed[place] for place in best([biased[i] for i in allowed], top_k)]
    total = sum(scores[i] for i in chosen) + 1e-20
    return [scale * score / total if i in chosen else 0 * score for i, score in enumerate(scores)]


def deepseek_v4_gates(logits: list[Tensor], bias: list[Tensor], top_k: int, scale: float) -> list[Tensor]:
    """DeepSeek-V4: as V3 without nodes, the affinity being sqrt(softplus(u . e_i))."""
    scores = [(1 + logit.exp()).log().sqrt() for logit in logits]
    chosen = best([score + b for score, b in zip(scores, bias, strict=True)], top_k)
    total = sum(scores[i] for i in chosen) + 1e-20
    return [scale * score / total if i in chosen else 0 * score for i, score in enumerate(scores)]


def mixtral_gates(logits: list[Tensor], top_k: int) -> list[Tensor]:
    """arXiv 2401.04088, section 2.1: softmax over the top-k logits."""
    chosen = best(logits, top_k)
    weights = dict(zip(chosen, softmax([logits[i] for i in chosen]), strict=True))
    return [weights.get(i, 0 * logit) for i, logit in enumerate(logits)]
