"""Each token takes its best experts: DeepSeekMoE (eqs 9-11), V2 (eqs 20-22), V3 (eqs 12-16), Mixtral, Qwen, OLMoE."""

import torch
import torch.nn.functional as F

from moekit.config.routing import TopKRouting
from moekit.kernels import logits as compiled
from moekit.kernels.choice import Way
from moekit.kernels.linear import MOST
from moekit.moe.selection.compiled_choice import compiled_choice
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, normalised
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """`select_top_k` with the layer's numbers."""

    def route(self, tokens: Tokens, centroids: Float[Tensor, "E D"] | None) -> tuple[Float[Tensor, "T E"], Selection]:
        """In one piece of compiled code where there is one, and nothing must know how other experts were ranked."""
        assert centroids is not None
        many = len(tokens.x) > MOST and self.config.capacity is None
        if not many or not compiled.computes(tokens.x, centroids):
            return super().route(tokens, centroids)
        found = compiled_choice(tokens.x, centroids, self.way(), (tokens.bias, tokens.factor))
        return found.logits, Selection(found.experts, found.weights, found.scores)

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        return select_top_k(self.rule, self.config.top_k, logits, tokens)

    def way(self) -> Way:
        rule, top_k = self.rule, self.config.top_k
        groups = (rule.n_groups, rule.top_k_groups, rule.summed(top_k))
        late = rule.order == "top_k_then_score"
        return Way(rule.score, late, top_k, *groups, rule.renormalise, rule.epsilon, rule.scale)


def select_top_k(rule: TopKRouting, top_k: int, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
    """The bias steers *which* experts win; the weights never see it (arXiv 2412.19437, eq 16)."""
    scores = score(rule, logits)
    ranking = tokens.steered(scores)
    if rule.top_k_groups < rule.n_groups:
        ranking = within_best_groups(ranking, rule, top_k)
    best, experts = ranking.topk(top_k, dim=-1)
    if rule.order == "top_k_then_score":
        weights = score(rule, logits.gather(-1, experts))
    else:
        weights = best if ranking is scores else scores.gather(-1, experts)
    if rule.renormalise:
        weights = normalised(weights, rule.epsilon)
    return Selection(experts, weights if rule.scale == 1 else weights * rule.scale, scores, ranking)


def score(rule: TopKRouting, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """How good each expert is for a token."""
    if rule.score == "softmax":
        return logits.softmax(dim=-1)
    if rule.score == "sigmoid":
        return logits.sigmoid()
    # The root of a softplus that underflows to 0 would have a gradient that is not a number.
    return F.softplus(logits).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()


def within_best_groups(ranking: Float[Tensor, "T E"], rule: TopKRouting, top_k: int) -> Float[Tensor, "T E"]:
    """Rank experts outside a token's best groups at -inf, so that even a negative bias cannot lose to them.

    A group's worth is its best expert (V2: the devices with the highest affinity) or the sum of its best two (V3's
    code) or top_k / top_k_groups (V3's paper).
    """
    by_group = ranking.unflatten(-1, (rule.n_groups, -1))
    worth = by_group.topk(rule.summed(top_k), dim=-1).values.sum(dim=-1)
    best = worth.topk(rule.top_k_groups, dim=-1).indices
    closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
    return by_group.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)
