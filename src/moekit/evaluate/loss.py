"""The negative log-likelihood of each token of a long text, read through overlapping windows."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Integer

from moekit.config.errors import InputError
from moekit.evaluate.mode import evaluation_mode
from moekit.model.transformer import Transformer
from moekit.tensors import Float, Int, Tensor

LOGITS_AT_ONCE = 2**24
"""64 MB in float32: a batch of windows at a vocabulary of 129280 would take gigabytes."""


class Window(NamedTuple):
    """Tokens `begin:end` are targets; those before `counted` are context that an earlier window has counted."""

    begin: int
    counted: int
    end: int


def windows(n_tokens: int, sequence_length: int, stride: int) -> list[Window]:
    """Cover `n_tokens` so that each is counted once, with at least sequence_length - stride tokens before it.

    The first window has no past to lean on. The last one is shorter where the tokens run out.
    """
    last = max(n_tokens - sequence_length, 0)
    n_windows = 1 + -(-last // stride)
    overlap = sequence_length - stride
    begins = [number * stride for number in range(n_windows)]
    return [
        Window(begin, begin + (overlap if begin else 0), min(begin + sequence_length, n_tokens)) for begin in begins
    ]


def sequence_nll(
    model: Transformer,
    tokens: Integer[np.ndarray, " N"],
    start: int,
    sequence_length: int,
    stride: int,
    batch: int = 8,
    on_tokens: Callable[[int], None] | None = None,
) -> Float64[np.ndarray, " N"]:
    """-ln p of each token given those before it in its window, in nats.

    The id `start` stands before the text, so that its first token is predicted too. A window moves on by `stride`
    tokens: stride = sequence_length gives plain windows, a smaller stride more context and more work. `on_tokens`
    hears how many tokens each batch has counted.
    """
    _check(model, tokens, start, sequence_length, stride, batch)
    device = model.embedding.weight.device
    nll = np.empty(len(tokens), np.float64)
    with evaluation_mode(model):
        for group in _batches(windows(len(tokens), sequence_length, stride), batch):
            ids = torch.stack([_inputs(tokens, start, window) for window in group]).to(device)
            states = model.hidden(ids).states
            kept = torch.cat([row[w.counted - w.begin :] for row, w in zip(states, group, strict=True)])
            targets = np.concatenate([tokens[w.counted : w.end] for w in group]).astype(np.int64)
            losses = _token_losses(model, kept, torch.from_numpy(targets).to(device)).double().cpu().numpy()
            done = 0
            for _, counted, end in group:
                nll[counted:end] = losses[done : done + end - counted]
                done += end - counted
            if on_tokens is not None:
                on_tokens(done)
    return nll


def _batches(all_windows: list[Window], batch: int) -> Iterator[list[Window]]:
    """Windows of one length together; a shorter last one alone, for padding would be one more thing to get right."""
    full = all_windows[0].end - all_windows[0].begin
    short = [window for window in all_windows if window.end - window.begin < full]
    whole = all_windows[: len(all_windows) - len(short)]
    for first in range(0, len(whole), batch):
        yield whole[first : first + batch]
    for window in short:
        yield [window]


def _inputs(tokens: Integer[np.ndarray, " N"], start: int, window: Window) -> Int[Tensor, " S"]:
    """What the model reads to predict the window's tokens: each one's predecessor."""
    if window.begin > 0:
        return torch.from_numpy(tokens[window.begin - 1 : window.end - 1].astype(np.int64))
    return torch.from_numpy(np.concatenate([[start], tokens[: window.end - 1]]).astype(np.int64))


def _token_losses(model: Transformer, states: Float[Tensor, "T D"], targets: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.cat([F.cross_entropy(model.head(part).float(), ids, reduction="none") for part, ids in parts])


def _check(
    model: Transformer, tokens: Integer[np.ndarray, " N"], start: int, sequence_length: int, stride: int, batch: int
) -> None:
    for name, value in (("sequence_length", sequence_length), ("stride", stride), ("batch", batch)):
        if value < 1:
            raise InputError(f"`{name}`: {value} must be above 0")
    if stride > sequence_length:
        raise InputError(
            f"`stride`: {stride} exceeds sequence_length = {sequence_length}",
            "tokens between windows would be left out",
        )
    if len(tokens) == 0:
        raise InputError("there are no tokens to evaluate")
    size = model.config.vocab_size
    for token in (int(tokens.min()), int(tokens.max()), start):
        if not 0 <= token < size:
            raise InputError(
                f"token id {token} is outside the model's vocabulary of {size}", "is this the model's own tokenizer?"
            )
