"""What a routing says about the load of the experts."""

import math

import torch

from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor


def load(routing: Routing) -> Int[Tensor, " E"]:
    """How many places each expert was given by real tokens, before any is dropped."""
    experts = routing.experts if routing.mask is None else routing.experts[routing.mask]
    return torch.bincount(experts.flatten() + 1, minlength=routing.n_experts + 1)[1:]


def gate_mass(routing: Routing) -> Float[Tensor, " E"]:
    """The sum of the weights with which real tokens use each expert."""
    used = routing.experts >= 0
    if routing.mask is not None:
        used = used & routing.mask.unsqueeze(-1)
    mass = routing.weights.new_zeros(routing.n_experts, dtype=torch.float32)
    return mass.index_add_(0, routing.experts[used], routing.weights[used].float())


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
