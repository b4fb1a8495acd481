"""Null experts: a token's choices may fall on experts that compute nothing (AdaMoE, arXiv 2406.13233)."""

import torch

from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, chosen_weights, normalised
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """P = softmax over N real and M null experts; the best `top_k` of all N + M, of which the real ones are served.

    The null experts' rows are the last of the router's matrix. Scores are those of the real experts, so they sum to
    less than 1; a selection bias steers the real ones among all. A token all of whose choices are null gets nothing.
    AdaMoE's code divides the real experts' weights by their sum: `renormalise`.
    """

    def select(self, logits: Float[Tensor, "T L"], tokens: Tokens) -> Selection:
        n_routed = self.config.n_routed
        scores, null = logits.softmax(dim=-1).split([n_routed, self.rule.n_null], dim=-1)
        ranking = tokens.steered(scores)
        best = torch.cat([ranking, null], dim=-1).topk(self.config.top_k, dim=-1).indices
        best = best.masked_fill(best >= n_routed, -1)
        experts = best.gather(-1, (best < 0).byte().argsort(dim=-1, stable=True))
        weights = chosen_weights(scores, experts)
        if self.rule.renormalise:
            weights = normalised(weights)
        return Selection(experts, weights, scores, ranking)
