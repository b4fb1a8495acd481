"""Noisy top-k gating: noise of a learned size spreads the load in training (arXiv 1701.06538, eqs 3-5)."""

import torch
import torch.nn.functional as F
from torch import nn

from moekit.config.moe import MoEConfig
from moekit.config.routing import NoisyTopKRouting
from moekit.moe.routing import Drawn
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """G(x) = softmax(KeepTopK(H(x), k)) with H(x)_i = (x W_g)_i + N(0, 1) softplus((x W_noise)_i); W_g the centroids.

    Outside training H(x) = x W_g. The scores are the softmax of H over all experts; `logits` are x W_g.

    The paper starts W_g and W_noise at 0, so that at first noise alone decides. Here W_noise starts at 0, which makes
    the deviation log 2, and the centroids start as in every model: from 0, evaluation would send all tokens to the
    same experts until the first step.
    """

    def __init__(self, rule: NoisyTopKRouting, config: MoEConfig) -> None:
        super().__init__(rule, config)
        self.noise = nn.Parameter(torch.empty(config.n_routed, config.width))

    @torch.no_grad()
    def start(self) -> None:
        """The same noise for every token and expert."""
        self.noise.zero_()

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        deviation = F.softplus(tokens.x.float() @ self.noise.float().T)
        noisy = logits
        if self.training:
            like = {"dtype": logits.dtype, "device": logits.device}
            noisy = logits + deviation * torch.randn(logits.shape, generator=tokens.generator, **like)
        scores = noisy.softmax(dim=-1)
        ranking = tokens.steered(scores)
        experts = ranking.topk(self.config.top_k, dim=-1).indices
        weights = noisy.gather(-1, experts).softmax(dim=-1)
        return Selection(experts, weights, scores, ranking, Drawn(logits, deviation, noisy))
