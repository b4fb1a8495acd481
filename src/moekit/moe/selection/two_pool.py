"""Two pools of experts, each with a softmax and a top-k of its own: some experts common to most tokens, others rare."""

import torch

from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, normalised
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """s = [softmax(common logits), softmax(other logits)]; of each pool the best, weighted by their s.

    A token always has `top_k_common` experts of the first pool, which stand first, and the rest of the second.
    """

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        pools = self.config.pools
        sizes = [size for size, _ in pools]
        scores = torch.cat([part.softmax(dim=-1) for part in logits.split(sizes, dim=-1)], dim=-1)
        ranking = tokens.steered(scores)
        experts, weights, first = [], [], 0
        for (_, chosen), part in zip(pools, ranking.split(sizes, dim=-1), strict=True):
            best = first + part.topk(chosen, dim=-1).indices
            own = scores.gather(-1, best)
            experts.append(best)
            weights.append(normalised(own) if self.rule.renormalise else own)
            first += part.shape[-1]
        return Selection(torch.cat(experts, dim=-1), torch.cat(weights, dim=-1), scores, ranking)
