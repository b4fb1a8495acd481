"""S-BASE (arXiv 2202.01169, section 3): in training the best of scores that Sinkhorn's iteration has balanced.

The iteration is that of Megatron-LM's router: with C = exp(logits), d0 = 1 / (T C d1) and d1 = 1 / (E C^T d0) until d1
moves by less than the tolerance on average; a token takes the `top_k` largest of d0 C d1. Its weights come from the
logits alone: sigmoid for one expert, softmax over all for several. Outside training it takes its best scores.
"""

import torch

from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, chosen_weights
from moekit.tensors import Float, Tensor

ROUNDS = 100
"""Rounds after which the iteration ends in any case."""


class Rule(SelectionRule):
    """Top-k of the balanced scores in training, of the scores outside it. Padding gets no expert in training."""

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        top_k = self.config.top_k
        scores = logits.sigmoid() if top_k == 1 else logits.softmax(dim=-1)
        if not self.training:
            experts = scores.topk(top_k, dim=-1).indices
        elif tokens.mask is None:
            experts = sinkhorn(logits, self.rule.tolerance).topk(top_k, dim=-1).indices
        else:
            experts = torch.full((len(logits), top_k), -1, device=logits.device)
            balanced = sinkhorn(logits[tokens.mask], self.rule.tolerance)
            experts[tokens.mask] = balanced.topk(top_k, dim=-1).indices
        return Selection(experts, chosen_weights(scores, experts), scores)


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "T E"], tolerance: float) -> Float[Tensor, "T E"]:
    """d0 C d1: each token's row sums to 1 / T, each expert's column to 1 / E, to the tolerance.

    Largest logits are subtracted from rows, then from columns. The factors take that up, and C holds a 1 in every row
    and column, so that nothing overflows and no column vanishes. The tolerance is that of these factors.
    """
    n_tokens, n_experts = logits.shape
    if n_tokens == 0:
        return logits
    balanced = logits - logits.amax(dim=1, keepdim=True)
    balanced = balanced.sub_(balanced.amax(dim=0)).exp_()
    d0, d1 = balanced.new_ones(n_tokens), balanced.new_ones(n_experts)
    for _ in range(ROUNDS):
        d0, before = 1 / (n_tokens * (balanced @ d1)).clamp_min(1e-30), d1
        d1 = 1 / (n_experts * (d0 @ balanced)).clamp_min(1e-30)
        if (d1 - before).abs().mean() <= tolerance:
            break
    return balanced.mul_(d0.unsqueeze(-1)).mul_(d1)
