"""Soft MoE (arXiv 2308.00951, eqs 1-3): experts work on slots, weighted means of all tokens of a sequence.

D = softmax over tokens of the logits, C = softmax over slots; slots D^T X, output C f(D^T X). As in the paper's
Algorithm 2 the logits are scale * l2norm(x) . l2norm(phi) with a learned scale that starts at 1; the centroids are
phi, `slots` rows for each expert. Every token uses every expert, and sees the whole sequence.
"""

import torch

from moekit.config.moe import MoEConfig
from moekit.config.routing import SoftRouting
from moekit.moe.experts import Experts
from moekit.moe.routing import Routing
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """The routing lists all experts for each token, each with the sum of the token's C over the expert's slots."""

    def __init__(self, rule: SoftRouting, config: MoEConfig) -> None:
        super().__init__(rule, config)
        self.scale = torch.nn.Parameter(torch.empty(()))

    @torch.no_grad()
    def start(self) -> None:
        self.scale.fill_(1.0)

    def logits(self, tokens: Tokens, centroids: Float[Tensor, "L D"] | None) -> Float[Tensor, "T L"]:
        assert centroids is not None
        return l2_norm(tokens.x.float()) @ (self.scale.float() * l2_norm(centroids.float())).T

    def select(self, logits: Float[Tensor, "T L"], tokens: Tokens) -> Selection:  # noqa: ARG002
        n_experts = self.config.n_routed
        scores = logits.softmax(dim=-1).unflatten(-1, (n_experts, -1)).sum(dim=-1)
        experts = torch.arange(n_experts, device=logits.device).expand(len(logits), -1)
        return Selection(experts, scores, scores)

    def combine(
        self,
        x: Float[Tensor, "T D"],
        routing: Routing,
        experts: Experts,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "T D"]:
        by_sequence = routing.logits.unflatten(0, (routing.n_sequences, -1))
        among_tokens = by_sequence
        if routing.mask is not None:
            padding = ~routing.mask.view(routing.n_sequences, -1, 1)
            # Not -inf: a sequence of nothing but padding would divide by zero.
            among_tokens = by_sequence.masked_fill(padding, torch.finfo(torch.float32).min)
        to_slots, from_slots = among_tokens.softmax(dim=1).to(x.dtype), by_sequence.softmax(dim=-1).to(x.dtype)
        slots = (to_slots.mT @ x.unflatten(0, (routing.n_sequences, -1))).flatten(0, 1)
        routed = _slots_in_order(len(slots), routing)
        out = experts(slots, routed.weights, experts.plan(slots, routed), generator)
        return (from_slots @ out.unflatten(0, (routing.n_sequences, -1))).flatten(0, 1)


def _slots_in_order(n_slots: int, routing: Routing) -> Routing:
    """The slots of each sequence as if they were tokens: equally many for each expert, in order, with weights of 1."""
    n_experts, slots = routing.n_experts, routing.logits.shape[-1] // routing.n_experts
    owner = torch.arange(n_slots, device=routing.logits.device) // slots % n_experts
    ones, scores = routing.logits.new_ones(n_slots, 1), routing.logits.new_zeros(n_slots, n_experts)
    return Routing(owner.unsqueeze(-1), ones, scores, scores)


def l2_norm(x: Float[Tensor, "X D"]) -> Float[Tensor, "X D"]:
    """x / (|x| + 1e-6) for each row."""
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)
