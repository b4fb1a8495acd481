"""Token choice where experts have room, expert choice where they do not.

Each token asks for its `top_k` experts of highest softmax score. An expert whose running load u_e is at most
`threshold` takes the tokens that ask for it. One above it does not: in training it takes its best n = ceil(T K / E)
real tokens of the batch (arXiv 2202.09368), outside training the tokens whose score reaches tau_e, a running average
over steps of the lowest score among its best n, so that no token looks at a later one.

u_e is a running average of (tokens that ask for e) / (their mean over experts). It measures what tokens ask for, not
what an expert takes: an expert that chooses takes an equal share, would look balanced at once, and be flooded again.
Tokens may end up with more than `top_k` experts, fewer, or none.
"""

import torch

from moekit.config.moe import MoEConfig
from moekit.config.routing import HybridRouting
from moekit.moe.routing import Routing
from moekit.moe.selection.expert_choice import best_tokens, follow_threshold, lowest_taken
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens, chosen_weights, listed
from moekit.moe.state import state
from moekit.tensors import Float, Tensor


class Rule(SelectionRule):
    """`load` is u, which starts balanced; `threshold` is tau, as in expert choice."""

    def __init__(self, rule: HybridRouting, config: MoEConfig) -> None:
        super().__init__(rule, config)
        self.load = state(torch.ones(config.n_routed))
        self.threshold = state(torch.ones(config.n_routed))

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        scores, top_k = logits.softmax(dim=-1), self.config.top_k
        asked = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(top_k, dim=-1).indices, True)
        taken = best_tokens(scores, top_k, tokens.mask) if self.training else scores >= self.threshold
        experts = listed(torch.where(self.load > self.rule.threshold, taken, asked), scores)
        return Selection(experts, chosen_weights(scores, experts), scores)

    def observe(self, routing: Routing) -> Float[Tensor, " two_E_and_1"]:
        """How many real tokens ask for each expert, then what expert choice observes."""
        asked = routing.scores.topk(self.config.top_k, dim=-1).indices
        asked = asked if routing.mask is None else asked[routing.mask]
        demand = torch.bincount(asked.flatten(), minlength=routing.n_experts).float()
        return torch.cat([demand, lowest_taken(routing.scores, self.config.top_k, routing.mask)])

    def after_step(self, observed: Float[Tensor, " two_E_and_1"]) -> None:
        demand, lowest = observed[: len(self.load)], observed[len(self.load) :]
        if lowest[-1] > 0:
            self.load.lerp_(demand / demand.mean(), 1 - self.rule.decay)
        follow_threshold(self.threshold, lowest, self.rule.decay)
