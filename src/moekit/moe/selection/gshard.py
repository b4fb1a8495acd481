"""GShard routing: the best two experts, the second at random in training (arXiv 2006.16668, Algorithm 1)."""

import torch

from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, normalised
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """g = softmax(W_g x); g1 and g2, the largest two, are divided by g1 + g2.

    In training the second expert is kept with probability min(1, 2 g2), g2 after division; g1 stays what it is where
    the second goes. The algorithm fills groups of tokens up to a capacity besides: that is `capacity`.
    """

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores = logits.softmax(dim=-1)
        ranking = tokens.steered(scores)
        experts = ranking.topk(2, dim=-1).indices
        weights = normalised(scores.gather(-1, experts))
        if self.training:
            draws = torch.rand(len(logits), generator=tokens.generator, device=logits.device)
            goes = torch.zeros_like(experts, dtype=torch.bool)
            goes[:, 1] = 2 * weights[:, 1] <= draws
            experts, weights = experts.masked_fill(goes, -1), weights.masked_fill(goes, 0)
        return Selection(experts, weights, scores, ranking)
