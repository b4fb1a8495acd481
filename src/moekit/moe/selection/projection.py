"""Gate, up and down matrices chosen separately: three routings of one token in one layer."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from moekit.moe.routing import Routing
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, normalised
from moekit.tensors import Float, Tensor

Matrix = Callable[[int], Float[Tensor, "out in"]]
"""The gate, up or down matrix of an expert."""


class Rule(SelectionRule):
    """h = silu(sum_i w_i G_i u) * (sum_j w_j U_j u) and y = sum_k w_k D_k h, over the chosen i, j and k.

    The matrices are those of E ordinary experts. The router scores 3E choices, a softmax over each E; a row of the
    routing lists gates 0 ... E-1, then ups E ... 2E-1, then downs 2E ... 3E-1. With one choice of each, all of the
    same expert, this is that expert. There is no paper to follow.
    """

    def select(self, logits: Float[Tensor, "T E3"], tokens: Tokens) -> Selection:
        n_tokens, n_experts, top_k = len(logits), self.config.n_routed, self.config.top_k
        scores = logits.view(-1, n_experts).softmax(dim=-1)
        ranking = tokens.steered(scores.view_as(logits))
        experts = ranking.view(-1, n_experts).topk(top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        weights = normalised(weights) if self.rule.renormalise else weights
        first = torch.arange(3, device=experts.device).unsqueeze(-1) * n_experts
        experts = (experts.view(n_tokens, 3, top_k) + first).view(n_tokens, 3 * top_k)
        return Selection(experts, weights.view_as(experts), scores.view_as(logits), ranking)

    def combine(
        self,
        x: Float[Tensor, "T D"],
        routing: Routing,
        experts: Experts,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "T D"]:
        """With dropout as inside an ordinary expert: of h, from `generator`."""
        gate, up, down = (_part(routing, number, self.config.n_routed) for number in range(3))
        gates, ups, downs = _matrices(experts)
        u, width = _rounded(x, experts), self.config.expert_width
        h = F.silu(mixed(u, gate, gates, width)) * mixed(u, up, ups, width)
        if experts.training and experts.dropout:
            kept = torch.empty_like(h).bernoulli_(1 - experts.dropout, generator=generator)
            h = h * kept / (1 - experts.dropout)
        return mixed(_rounded(h, experts), down, downs, self.config.width)


def mixed(x: Float[Tensor, "T A"], routing: Routing, matrix: Matrix, width: int) -> Float[Tensor, "T B"]:
    """sum_i w_i M_i x of each token, one product per matrix that any token chose; the sum is taken in float32."""
    plan = dispatch(routing)
    rows = x.index_select(0, plan.tokens)
    # Not rows[start:end]: under autograd each slice would allocate a gradient of all rows.
    shares = enumerate(rows.split([end - start for start, end in pairwise(plan.bounds)]))
    products = torch.cat([x.new_empty(0, width), *(share @ matrix(i).mT for i, share in shares if len(share))])
    # Padding has no place, and so a weight of 0; empty places go to a row behind the last.
    weights = x.new_zeros(plan.n_rows + 1, dtype=routing.weights.dtype)
    weights = weights.index_copy(0, plan.rows.flatten(), routing.weights.flatten())[:-1]
    total = x.new_zeros(len(x), width, dtype=routing.weights.dtype)
    return total.index_add(0, plan.tokens, products * weights.unsqueeze(-1)).to(x.dtype)


def _part(routing: Routing, number: int, n_experts: int) -> Routing:
    """The routing among the gates (0), the ups (1) or the downs (2) alone."""
    chosen = routing.experts if routing.served is None else routing.served
    own = chosen.chunk(3, dim=-1)[number] - number * n_experts
    own = own.masked_fill((own < 0) | (own >= n_experts), -1)
    weights, scores = routing.weights.chunk(3, dim=-1)[number], routing.scores[:, :n_experts]
    return routing._replace(experts=own, weights=weights, scores=scores, served=None)


def _matrices(experts: Experts) -> tuple[Matrix, Matrix, Matrix]:
    """Gates, ups and downs; those still on disk are read when a token comes to them."""
    stored = experts.stored
    if stored is not None and not torch.is_grad_enabled():
        return lambda i: stored(i)[0].chunk(2)[0], lambda i: stored(i)[0].chunk(2)[1], lambda i: stored(i)[1]
    # Not experts.gate_up[i]: under autograd each index would allocate a gradient of the whole stack.
    gates, ups = experts.gate_up.unflatten(1, (2, -1)).unbind(1)
    return gates.unbind(0).__getitem__, ups.unbind(0).__getitem__, experts.down.unbind(0).__getitem__


def _rounded(x: Float[Tensor, "T A"], experts: Experts) -> Float[Tensor, "T A"]:
    """The input of a product as the experts would round it (simulated FP8); its gradient is the identity's."""
    return x if experts.round_inner is None else experts.round_inner(x.detach()) + (x - x.detach())
