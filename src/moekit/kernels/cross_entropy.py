"""Cross entropy of rows of logits, with its gradient in their place."""

import torch

from moekit.kernels.library import library, reaches
from moekit.tensors import Float, Int, Tensor


def cross_entropy_(logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"], gradient: bool) -> Float[Tensor, " R"]:
    """-log softmax(logits)[target] of each row, in float32; with `gradient` the logits become its gradient."""
    compiled = library()
    if compiled is None or not reaches(logits) or not targets.is_contiguous():
        return cross_entropy_twin_(logits, targets, gradient)
    losses = torch.empty(len(logits), dtype=torch.float32)
    narrow, threads, level = logits.dtype == torch.bfloat16, torch.get_num_threads(), compiled.moekit_level()
    where, wanted, found = logits.data_ptr(), targets.data_ptr(), losses.data_ptr()
    compiled.moekit_cross_entropy(where, narrow, wanted, *logits.shape, gradient, found, threads, level)
    return losses


def cross_entropy_twin_(
    logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"], gradient: bool
) -> Float[Tensor, " R"]:
    """As `cross_entropy_`, by torch."""
    places = targets.unsqueeze(-1)
    log_probability = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = -log_probability.gather(-1, places).squeeze(-1)
    if gradient:
        ones = torch.full_like(places, -1, dtype=torch.float32)
        logits.copy_(log_probability.exp_().scatter_add_(-1, places, ones))
    return losses
