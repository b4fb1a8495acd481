"""How far apart the predictions of two models are."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Integer

from moekit.config.errors import InputError
from moekit.model.mode import evaluation_mode
from moekit.model.transformer import Transformer
from moekit.tensors import Float, Tensor

WINDOW = 512
"""Tokens that a model reads at once, at most."""

LOGITS_AT_ONCE = 2**22
"""32 MB in float64, of which a comparison needs a few."""


class LogitDifference(NamedTuple):
    """Over all positions: |a - b| of the logits, the Kullback-Leibler divergence KL(A || B) of the predicted
    distributions in nats, and the share of positions at which both find the same token the likeliest."""

    positions: int
    largest: float
    mean: float
    divergence: float
    largest_divergence: float
    agreement: float


def logit_difference(
    a: Transformer,
    b: Transformer,
    ids: Integer[np.ndarray, " N"],
    on_tokens: Callable[[int], None] | None = None,
) -> LogitDifference:
    """Compare the logits of two models on the tokens `ids`, in windows of 512 that do not overlap.

    `on_tokens` hears how many tokens each window has had. Raises InputError for vocabularies of different sizes, for no
    tokens, and for an id outside the vocabulary; FloatingPointError where logits are not finite.
    """
    _check(a, b, ids)
    length = min(WINDOW, a.config.max_positions, b.config.max_positions)
    rows = max(1, LOGITS_AT_ONCE // a.config.vocab_size)
    found: list[Float[Tensor, "rows 4"]] = []
    with evaluation_mode(a), evaluation_mode(b):
        for window in torch.from_numpy(ids.astype(np.int64)).split(length):
            states = [model.hidden(window.unsqueeze(0).to(model.embedding.weight.device)).states[0] for model in (a, b)]
            for part_a, part_b in zip(states[0].split(rows), states[1].split(rows), strict=True):
                found.append(_rows(a.head(part_a).double().cpu(), b.head(part_b).double().cpu()))
            if on_tokens is not None:
                on_tokens(len(window))
    largest, mean, divergence, same = torch.cat(found).unbind(dim=1)
    if not (largest.isfinite() & divergence.isfinite()).all():
        raise FloatingPointError("the models' logits on this text are not all finite")
    return LogitDifference(
        len(ids),
        float(largest.max()),
        float(mean.mean()),
        float(divergence.mean()),
        float(divergence.max()),
        float(same.mean()),
    )


def _rows(a: Float[Tensor, "rows V"], b: Float[Tensor, "rows V"]) -> Float[Tensor, "rows 4"]:
    """At each position: largest and mean |a - b|, sum p_a (ln p_a - ln p_b), and whether the best is the same."""
    difference = (a - b).abs()
    same = a.argmax(dim=-1) == b.argmax(dim=-1)
    log_a, log_b = a.log_softmax(dim=-1), b.log_softmax(dim=-1)
    divergence = (log_a.exp() * (log_a - log_b)).sum(dim=-1)
    return torch.stack([difference.amax(dim=-1), difference.mean(dim=-1), divergence, same.double()], dim=-1)


def _check(a: Transformer, b: Transformer, ids: Integer[np.ndarray, " N"]) -> None:
    sizes = a.config.vocab_size, b.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: their logits do not compare"
        )
    if len(ids) == 0:
        raise InputError("there are no tokens to compare the models on")
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < sizes[0]:
            raise InputError(f"token id {token} is outside the models' vocabulary of {sizes[0]}")
