"""Switch routing: one expert for each token, weighted by its softmax score (arXiv 2101.03961, eqs 1-2)."""

import torch

from moekit.moe.selection.rule import Selection, SelectionRule, Tokens
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """p = softmax(W_r x); y = p_i E_i(x) for the expert i of the largest p.

    In training the router reads x times uniform numbers from 1 - jitter to 1 + jitter (section 2.4). The paper's code
    jitters what the router reads; the experts get x as it is.
    """

    def logits(self, tokens: Tokens, centroids: Float[Tensor, "E D"] | None) -> Float[Tensor, "T E"]:
        jitter = self.rule.jitter
        if not self.training or jitter == 0:
            return super().logits(tokens, centroids)
        x = tokens.x.float()
        factors = torch.empty_like(x).uniform_(1 - jitter, 1 + jitter, generator=tokens.generator)
        return super().logits(tokens._replace(x=x * factors), centroids)

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores = logits.softmax(dim=-1)
        ranking = tokens.steered(scores)
        experts = ranking.argmax(dim=-1, keepdim=True)
        return Selection(experts, scores.gather(-1, experts), scores, ranking)
