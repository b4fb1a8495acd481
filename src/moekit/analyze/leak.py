"""Whether a model looks ahead: replace later tokens, and see whether what it makes of earlier ones moves."""

import torch

from moekit.config.errors import InputError
from moekit.model.mode import evaluation_mode
from moekit.model.transformer import Transformer
from moekit.tensors import Int, Tensor

REPLACEMENTS = 4
"""Replacements of the later tokens that are tried: one may leave a routing as it was by chance."""


def future_leak(model: Transformer, ids: Int[Tensor, "B S"], cut: int, tasks: Int[Tensor, " B"] | None = None) -> float:
    """The largest change of a hidden state before position `cut` when all ids from there on are replaced.

    0, or what rounding makes of it, where no token sees a later one. Expert choice leaks (arXiv 2408.15664
    estimates how much), and so does Soft MoE. The model is used in evaluation mode and left as it was. Raises an
    InputError where `cut` leaves no token before it or none to replace.
    """
    length = ids.shape[1]
    if not 0 < cut < length:
        raise InputError(f"`cut`: {cut} must lie between 0 and the sequences' length {length}", "cut in the middle")
    with evaluation_mode(model):
        before = model.hidden(ids, tasks=tasks).states[:, :cut].float()
        return max(
            (model.hidden(other, tasks=tasks).states[:, :cut].float() - before).abs().max().item()
            for other in _replaced(ids, cut, model.config.vocab_size)
        )


def _replaced(ids: Int[Tensor, "B S"], cut: int, vocab_size: int) -> list[Int[Tensor, "B S"]]:
    """Copies of `ids` in which every id from `cut` on is another, as far apart as the vocabulary allows."""
    shifts = {1 + (vocab_size - 1) * step // REPLACEMENTS for step in range(REPLACEMENTS)}
    return [torch.cat([ids[:, :cut], (ids[:, cut:] + shift) % vocab_size], dim=1) for shift in sorted(shifts)]
