"""BASE layers (arXiv 2103.16716): in training equally many tokens for each expert, outside it the best expert.

Training solves the assignment of section 3.2: max sum_t h_t . w_{a_t}, where every expert gets floor(T / E) or
ceil(T / E) real tokens of the batch. The output of a token is x + sigmoid(h_t . w_a) f_a(h_t) (eq 1), as the residual
stream adds x.
"""

import torch

from moekit.moe.selection.assignment import balanced_assignment
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, chosen_weights
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """`balanced_assignment` in training, argmax outside it. Padding gets no expert in training."""

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores = logits.sigmoid()
        if not self.training:
            experts = logits.argmax(dim=-1)
        elif tokens.mask is None:
            experts = balanced_assignment(logits)
        else:
            experts = torch.full_like(tokens.mask, -1, dtype=torch.long)
            experts[tokens.mask] = balanced_assignment(logits[tokens.mask])
        experts = experts.unsqueeze(-1)
        return Selection(experts, chosen_weights(scores, experts), scores)
