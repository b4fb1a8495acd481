"""How differently domains use the experts, next to what chance alone would show."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moekit.analyze.domains import DomainTrace, count_assignments


class Specialisation(NamedTuple):
    """What each of N domains asks of E experts in L layers.

    `divergence` is the Jensen-Shannon divergence of the domains' expert distributions, each domain with the same
    weight: the bits one routed slot tells about its domain. 0: all domains use the experts alike; log2 N: no expert
    serves two domains. `shuffled` is the same number after each of P random permutations of the tokens' domains.
    """

    share: Float[np.ndarray, "N L E"]
    """share of a domain's tokens that visit the expert; `uniform` if all experts were alike"""
    uniform: float
    divergence: Float[np.ndarray, " L"]
    pairwise: Float[np.ndarray, "L N N"]
    """the divergence of two domains alone, from 0 to 1 bit"""
    shuffled: Float[np.ndarray, "P L"]


def specialisation(trace: DomainTrace, permutations: int = 20, seed: int = 0) -> Specialisation:
    """Shares, divergences and their shuffled control.

    Shuffling treats tokens as independent, which neighbours in a text are not: it bounds chance from below.
    """
    n_domains, n_layers, n_experts = trace.counts.shape
    share = trace.counts / np.maximum(trace.tokens, 1)[:, None, None]
    pairwise = np.zeros((n_layers, n_domains, n_domains))
    for one in range(n_domains):
        for other in range(one):
            pairwise[:, one, other] = pairwise[:, other, one] = divergence(trace.counts[[one, other]])
    rng = np.random.default_rng(seed)
    shuffled = np.zeros((permutations, n_layers))
    for row in range(permutations):
        labels = rng.permutation(trace.labels)
        shuffled[row] = divergence(count_assignments(trace.experts, labels, n_domains, n_experts))
    return Specialisation(share, trace.experts.shape[-1] / n_experts, divergence(trace.counts), pairwise, shuffled)


def divergence(counts: Int[np.ndarray, "N L E"]) -> Float[np.ndarray, " L"]:
    """Jensen-Shannon divergence in bits: entropy of the mean distribution minus mean of the entropies."""
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return np.maximum(_bits(shares.mean(axis=0)) - _bits(shares).mean(axis=0), 0.0)


def _bits(shares: Float[np.ndarray, "*shape E"]) -> Float[np.ndarray, "*shape"]:
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(axis=-1)
