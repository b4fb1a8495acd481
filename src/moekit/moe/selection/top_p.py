"""Top-p routing: as many experts as it takes for their scores to reach p (arXiv 2403.07652, section 3)."""

import torch.nn.functional as F

from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, normalised
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """P = softmax(W_r x); experts in order of P up to the first t with P_1 + ... + P_t >= p, each with weight P_i.

    The paper's code (Dynamic_MoE) goes on until the sum is above p, and like the paper does not renormalise. Neither
    has the limit of `top_k` experts a token. Under a selection bias the order is that of the steered scores; what must
    reach p are the scores themselves.
    """

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores = logits.softmax(dim=-1)
        ranking = tokens.steered(scores)
        best = ranking.topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(-1, best)
        before = F.pad(weights.detach().cumsum(dim=-1)[:, :-1], (1, 0))
        enough = before >= self.rule.p
        weights = weights.masked_fill(enough, 0)
        if self.rule.renormalise:
            weights = normalised(weights)
        return Selection(best.masked_fill(enough, -1), weights, scores, ranking)
