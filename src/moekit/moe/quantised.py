"""Feed-forwards with quantised weights: any number of rows, one parallel region, no gradients."""

from collections.abc import Callable
from itertools import pairwise

import torch

from moekit.kernels import few_rows
from moekit.kernels.few_rows import Expert
from moekit.kernels.linear import without_gradient
from moekit.kernels.packed import Matrix
from moekit.moe.dispatch import Dispatch
from moekit.tensors import Float, Tensor

Matrices = Callable[[int], tuple[Matrix, Matrix]]
"""The two matrices of an expert."""


def weighted_sum(
    x: Float[Tensor, "T D"], weights: Float[Tensor, "T K"], plan: Dispatch, matrices_of: Matrices
) -> Float[Tensor, "T D"]:
    """The weighted sum, for each token, of the experts that serve it; experts without a token are not read."""
    used = [(expert, start, end) for expert, (start, end) in enumerate(pairwise(plan.bounds)) if end > start]
    sizes = [end - start for _, start, end in used]
    # Padding has no place, and so a weight of 0; empty places go to a row behind the last.
    factors = weights.new_zeros(plan.n_rows + 1).index_copy_(0, plan.rows.view(-1), weights.detach().reshape(-1))
    shares = zip(used, plan.tokens.split(sizes), factors[:-1].split(sizes), strict=True)
    experts = [Expert(*matrices_of(expert), tokens, own) for (expert, *_), tokens, own in shares] if used else []
    return without_gradient(few_rows.swiglu(x.detach(), experts, x.dtype), x, weights)


def swiglu(x: Float[Tensor, "*shape D"], gate_up: Matrix, down: Matrix) -> Float[Tensor, "*shape D"]:
    """The feed-forward that every token passes."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    everyone = Expert(gate_up, down, torch.arange(len(tokens)), torch.ones(len(tokens)))
    return without_gradient(few_rows.swiglu(tokens, [everyone], x.dtype).view(x.shape), x)
