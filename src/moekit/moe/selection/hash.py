"""A fixed table from token ids to experts: Hash Layers (arXiv 2106.04426)."""

from heapq import heappop, heappush

import torch

from moekit.config.errors import ConfigError, InputError
from moekit.config.moe import MoEConfig
from moekit.config.routing import HashRouting
from moekit.moe.selection.rule import Selection, SelectionRule, Tokens
from moekit.moe.state import state
from moekit.tensors import Float, Int, Tensor

ROWS = 4096
"""Ids whose experts are drawn at a time: random numbers for a whole vocabulary would be V x E."""


class Rule(SelectionRule):
    """h = 1/K sum of the K experts that `table` holds for the token's id; the token's vector has no say.

    The paper's layers have K = 1, and so a weight of 1. All layers of a model share one table, which follows from the
    seed (random) or from it and the training text (balanced). `table` holds whole numbers in float32, as state is
    saved and kept, which are exact below 2^24.
    """

    def __init__(self, rule: HashRouting, config: MoEConfig) -> None:
        super().__init__(rule, config)
        if rule.vocab_size == 0:
            hint = "a layer on its own needs the number of token ids"
            raise ConfigError("routing.vocab_size", "must be above 0 for hash routing", hint)
        self.table = state(torch.empty(rule.vocab_size, config.top_k))

    def start(self) -> None:
        """Draw the experts of each id, all of them equally likely and no two of a row the same."""
        if not self.table.is_meta:
            generator = torch.Generator().manual_seed(self.rule.seed)
            for rows in self.table.split(ROWS):
                drawn = torch.rand(len(rows), self.config.n_routed, generator=generator, device="cpu")
                rows.copy_(drawn.topk(self.config.top_k, dim=-1).indices)

    def fill(self, counts: Float[Tensor, " V"] | Int[Tensor, " V"]) -> None:
        """Balanced assignment: the most frequent id first, each to the experts with the fewest tokens so far.

        `counts` says how often each id stands in the training text, in any unit. Ids that never do keep their experts,
        for else one expert would get them all.
        """
        load = [(0.0, expert) for expert in range(self.config.n_routed)]
        order = counts.argsort(descending=True, stable=True)
        table = self.table.tolist()
        for token, count in zip(order.tolist(), counts[order].tolist(), strict=True):
            if count > 0:
                least = [heappop(load) for _ in range(self.config.top_k)]
                table[token] = [expert for _, expert in least]
                for tokens, expert in least:
                    heappush(load, (tokens + count, expert))
        self.table.copy_(torch.tensor(table))

    def logits(self, tokens: Tokens, centroids: Float[Tensor, "E D"] | None) -> Float[Tensor, "T E"]:  # noqa: ARG002
        """There is no router: all zero."""
        return tokens.x.new_zeros(len(tokens.x), self.config.n_routed, dtype=torch.float32)

    def select(self, logits: Float[Tensor, "T E"], tokens: Tokens) -> Selection:
        experts = self.table[self._ids(tokens)].long()
        weights = torch.full_like(experts, 1 / self.config.top_k, dtype=torch.float32)
        scores = torch.zeros_like(logits).scatter_(-1, experts, weights)
        return Selection(experts, weights, scores, scores.masked_fill(scores == 0, -torch.inf))

    def _ids(self, tokens: Tokens) -> Int[Tensor, " T"]:
        if tokens.ids is None:
            raise InputError("hash routing needs the token ids", "give them: layer(x, ids=ids)")
        unknown = tokens.ids[(tokens.ids < 0) | (tokens.ids >= len(self.table))]
        if len(unknown):
            hint = f"ids go from 0 to {len(self.table) - 1}"
            raise InputError(f"token id {int(unknown[0])} is not in the table", hint)
        return tokens.ids
