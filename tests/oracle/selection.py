"""How one token chooses its experts by rules other than top-k, as each paper writes it.

Every function takes the token's logits, one for each choice (x . w_i), what was drawn for the token where the rule
draws, and `bias`, which is added where experts are compared. It returns the weight of each chosen expert, in order of
choice. Logits are lists, and the entries may be tensors with a gradient.
"""

from torch import Tensor

from oracle.gates import best, softmax

Chosen = dict[int, Tensor]


def steered(scores: list[Tensor], bias: list[float]) -> list[Tensor]:
    return [score + b for score, b in zip(scores, bias, strict=True)]


def divided_by_their_sum(chosen: Chosen) -> Chosen:
    total = sum(chosen.values())
    return {i: weight / total for i, weight in chosen.items()}


def noisy_logits(logits: list[Tensor], noise: list[Tensor], draws: list[float]) -> list[Tensor]:
    """arXiv 1701.06538, eq 4: H(x)_i = (x W_g)_i + StandardNormal() Softplus((x W_noise)_i)."""
    return [h + z * (1 + n.exp()).log() for h, n, z in zip(logits, noise, draws, strict=True)]


def noisy_top_k(noisy: list[Tensor], bias: list[float], top_k: int) -> Chosen:
    """arXiv 1701.06538, eqs 3 and 5: softmax(KeepTopK(H(x), k))."""
    chosen = best(steered(softmax(noisy), bias), top_k)
    return dict(zip(chosen, softmax([noisy[i] for i in chosen]), strict=True))


def switch(logits: list[Tensor], bias: list[float]) -> Chosen:
    """arXiv 2101.03961, eqs 1-2: the expert of the largest probability, weighted by it."""
    scores = softmax(logits)
    (chosen,) = best(steered(scores, bias), 1)
    return {chosen: scores[chosen]}


def gshard(logits: list[Tensor], bias: list[float], draw: float | None) -> Chosen:
    """arXiv 2006.16668, Algorithm 1, lines 11-21, without its capacities; no draw outside training."""
    scores = softmax(logits)
    one, two = best(steered(scores, bias), 2)
    g1, g2 = scores[one] / (scores[one] + scores[two]), scores[two] / (scores[one] + scores[two])
    return {one: g1, two: g2} if draw is None or 2 * g2 > draw else {one: g1}


def top_p(logits: list[Tensor], bias: list[float], p: float, most: int, renormalise: bool) -> Chosen:
    """arXiv 2403.07652, section 3: t = the least k with P_1 + ... + P_k >= p; the first t experts, weighted by P_i."""
    scores, chosen = softmax(logits), {}
    for i in best(steered(scores, bias), most):
        chosen[i] = scores[i]
        if sum(chosen.values()) >= p:
            break
    return divided_by_their_sum(chosen) if renormalise else chosen


def null(logits: list[Tensor], bias: list[float], n_real: int, top_k: int, renormalise: bool) -> Chosen:
    """arXiv 2406.13233: the best of real and null experts, of which the real ones are used."""
    scores = softmax(logits)
    chosen = best(steered(scores[:n_real], bias) + scores[n_real:], top_k)
    used = {i: scores[i] for i in chosen if i < n_real}
    return divided_by_their_sum(used) if renormalise else used


def two_pool(
    logits: list[Tensor], bias: list[float], n_common: int, takes: tuple[int, int], renormalise: bool
) -> Chosen:
    """Each pool as if it were alone; the experts of the second are numbered after those of the first."""
    chosen: Chosen = {}
    for first, last, k in ((0, n_common, takes[0]), (n_common, len(logits), takes[1])):
        scores = softmax(logits[first:last])
        pool = {first + i: scores[i] for i in best(steered(scores, bias[first:last]), k)}
        chosen |= divided_by_their_sum(pool) if renormalise else pool
    return chosen
