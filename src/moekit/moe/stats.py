"""What a routing says about the load of the experts."""

import math
from typing import NamedTuple

import torch

from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


class Observed(NamedTuple):
    """What a layer saw in one or more micro-batches; sums, so that those of a step, or of several ranks, add up.

    `load` is counted before any token is dropped, `served` after; `rule` is what the selection rule keeps count of.
    """

    load: Int[Tensor, " E"]
    served: Int[Tensor, ""]
    tokens: Int[Tensor, ""]
    rule: Float[Tensor, " *shape"] | None = None

    def __add__(self, other: "Observed") -> "Observed":  # type: ignore[override]
        rule = None if self.rule is None or other.rule is None else self.rule + other.rule
        return Observed(self.load + other.load, self.served + other.served, self.tokens + other.tokens, rule)


@torch.no_grad()
def observe(routing: Routing, rule: Float[Tensor, " *shape"] | None = None) -> Observed:
    """Load, served places and real tokens of a routing, and what its rule observed."""
    served = routing.experts if routing.served is None else routing.served
    real = served if routing.mask is None else served[routing.mask]
    return Observed(load(routing), (real >= 0).sum(), torch.tensor(len(real), device=real.device), rule)


def load(routing: Routing) -> Int[Tensor, " E"]:
    """How many places each expert was given by real tokens, before any is dropped."""
    experts = routing.experts if routing.mask is None else routing.experts[routing.mask]
    return torch.bincount(experts.flatten() + 1, minlength=routing.n_experts + 1)[1:]


def gate_mass(routing: Routing) -> Float[Tensor, " E"]:
    """The sum of the weights with which real tokens choose each expert, before any is dropped."""
    used = routing.experts >= 0
    if routing.mask is not None:
        used = used & routing.mask.unsqueeze(-1)
    mass = routing.scores.new_zeros(routing.n_experts, dtype=torch.float32)
    return mass.index_add_(0, routing.experts[used], routing.assigned_weights[used].float())


def max_violation(load: Float[Tensor, "*shape E"] | Int[Tensor, "*shape E"]) -> Float[Tensor, "*shape"]:
    """MaxVio = (largest load - mean load) / mean load (arXiv 2408.15664, eq 4); 0 at perfect balance and for no load.

    Of one batch's load it is MaxVio_batch, of the load summed over a whole set MaxVio_global.
    """
    load = load.float()
    mean = load.mean(dim=-1)
    return torch.where(mean > 0, load.amax(dim=-1) / mean.clamp_min(1e-12) - 1, torch.zeros_like(mean))


def entropy(load: Float[Tensor, "*shape E"] | Int[Tensor, "*shape E"]) -> Float[Tensor, "*shape"]:
    """Entropy of the load divided by log E: 1 where all experts work equally, 0 where one does everything."""
    share = load.float() / load.float().sum(dim=-1, keepdim=True).clamp_min(1e-12)
    total = torch.special.entr(share).sum(dim=-1)
    return total / math.log(load.shape[-1]) if load.shape[-1] > 1 else torch.ones_like(total)


def dead_experts(load: Float[Tensor, "*shape E"] | Int[Tensor, "*shape E"]) -> Int[Tensor, "*shape"]:
    """The number of experts that no token used."""
    return (load == 0).sum(dim=-1)
