"""Expert choice (arXiv 2202.09368, eqs 1-4): S = softmax(X W_g), each expert takes its n = ceil(T K / E) best tokens.

K is `top_k`, the paper's capacity factor c; T counts real tokens. A token's experts depend on the other tokens, later
ones included. With `decode: threshold` a token outside training goes by itself: to the experts whose threshold its
score reaches, a running average over steps of the lowest score that the expert took; to its best expert in any case,
and to min(E, 4 K) at most.
"""

import torch

from moekit.config.moe import MoEConfig
from moekit.config.routing import ExpertChoiceRouting
from moekit.moe.routing import Routing
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, chosen_weights, listed
from moekit.moe.state import state
from moekit.tensors import Bool, Float, Int, Tensor


class Rule(SelectionRule):
    """A threshold of 1, which no softmax score exceeds, says that nothing was observed yet."""

    def __init__(self, rule: ExpertChoiceRouting, config: MoEConfig) -> None:
        super().__init__(rule, config)
        self.threshold = state(torch.ones(config.n_routed))

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores, top_k = logits.softmax(dim=-1), self.config.top_k
        if self.training or self.rule.decode == "none":
            groups = tokens.n_sequences if self.rule.scope == "sequence" else 1
            experts = listed(best_tokens(scores, top_k, tokens.mask, groups), scores)
        else:
            reached = (scores >= self.threshold).scatter(-1, scores.argmax(dim=-1, keepdim=True), True)
            experts = listed(reached, scores)[:, : 4 * top_k]
        return Selection(experts, chosen_weights(scores, experts), scores)

    def observe(self, routing: Routing) -> Float[Tensor, " E_and_1"]:
        """The lowest scores times the real tokens they were found among, and at the end these tokens."""
        groups = routing.n_sequences if self.rule.scope == "sequence" else 1
        return lowest_taken(routing.scores, self.config.top_k, routing.mask, groups)

    def after_step(self, observed: Float[Tensor, " E_and_1"]) -> None:
        follow_threshold(self.threshold, observed, self.rule.decay)


def best_tokens(
    scores: Float[Tensor, "T E"], top_k: int, mask: Bool[Tensor, " T"] | None, groups: int = 1
) -> Bool[Tensor, "T E"]:
    """Which tokens each expert takes, in each of `groups` equal pieces of the tokens by itself."""
    ranking, n_taken = _ranking(scores, top_k, mask, groups)
    places = ranking.topk(int(n_taken.max()), dim=-1).indices
    within = torch.arange(places.shape[-1], device=scores.device) < n_taken.view(-1, 1, 1)
    taken = torch.zeros_like(ranking, dtype=torch.bool).scatter_(-1, places, within.expand_as(places))
    return taken.mT.flatten(0, 1)


@torch.no_grad()
def lowest_taken(
    scores: Float[Tensor, "T E"], top_k: int, mask: Bool[Tensor, " T"] | None, groups: int = 1
) -> Float[Tensor, " E_and_1"]:
    """Sum over groups of real tokens times the lowest score that each expert takes, and the sum of real tokens."""
    ranking, n_taken = _ranking(scores, top_k, mask, groups)
    real = (ranking[:, :1] >= 0).sum(dim=-1)
    if not ranking.shape[-1]:
        return scores.new_zeros(scores.shape[-1] + 1)
    best = ranking.topk(max(int(n_taken.max()), 1), dim=-1).values
    last = (n_taken - 1).clamp_min(0).view(-1, 1, 1).expand(-1, best.shape[1], 1)
    lowest = best.gather(-1, last).squeeze(-1)
    return torch.cat([(lowest * real).sum(dim=0), real.sum().float().unsqueeze(0)])


@torch.no_grad()
def follow_threshold(threshold: Float[Tensor, " E"], observed: Float[Tensor, " E_and_1"], decay: float) -> None:
    """Move the running average in place; the first observation is taken whole, none changes nothing."""
    if observed[-1] == 0:
        return
    lowest = observed[:-1] / observed[-1]
    threshold.copy_(torch.where(threshold < 1, decay * threshold + (1 - decay) * lowest, lowest))


def _ranking(
    scores: Tensor, top_k: int, mask: Tensor | None, groups: int
) -> tuple[Float[Tensor, "G E S"], Int[Tensor, " G"]]:
    """Scores as each expert sees them, -1 for padding, and how many tokens of each group an expert takes."""
    by_group = scores.detach().unflatten(0, (groups, -1)).mT
    _, n_experts, length = by_group.shape
    if mask is None:
        return by_group, torch.full((groups,), -(-length * top_k // n_experts), device=scores.device)
    real = mask.view(groups, 1, length)
    return by_group.masked_fill(~real, -1), -(-real.sum(dim=(1, 2)) * top_k // n_experts)
