"""The negative log-likelihood of each token of a long text, read through overlapping windows."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64, Integer

from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.config.routing import TaskRouting
from moekit.model.mode import evaluation_mode
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
    task: int | None = None,
) -> Float64[np.ndarray, " N"]:
    """-ln p of each token given those before it in its window, in nats.

    The id `start` stands before the text, so that its first token is predicted too. A window moves on by `stride`
    tokens: stride = sequence_length gives plain windows, a smaller stride more context and more work. `on_tokens`
    hears how many tokens each batch has counted. `task` is the text's, where the model routes by task.
    """
    _check(model, tokens, start, sequence_length, stride, batch)
    device = model.embedding.weight.device
    nll = np.empty(len(tokens), np.float64)
    with evaluation_mode(model):
        for group in _batches(windows(len(tokens), sequence_length, stride), batch):
            ids = torch.stack([_inputs(tokens, start, window) for window in group]).to(device)
            states = model.hidden(ids, tasks=row_tasks(model, task, len(ids))).states
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


def routes_by_task(config: ModelConfig) -> bool:
    """Whether the model must know the task of each sequence."""
    return bool(config.moe_layers) and isinstance(config.moe.routing, TaskRouting)


def check_tasks(config: ModelConfig, task: int | Sequence[int] | None, n_rows: int) -> None:
    """Raise an InputError unless `task`, one for all rows or one for each, is what the model needs to be told."""
    routing = config.moe.routing
    if not (isinstance(routing, TaskRouting) and routes_by_task(config)):
        if task is not None:
            raise InputError(f"`task`: {task} is given, but this model does not route by task", "leave it out")
        return
    hint = f"tasks go from 0 to {routing.n_tasks - 1}, in the order of the domains the model was trained on"
    if task is None and routing.n_tasks > 1:
        raise InputError("`task`: this model routes by task and must be told which", hint)
    each = [task or 0] if task is None or isinstance(task, int) else task
    wrong = [number for number in each if not 0 <= number < routing.n_tasks]
    if wrong:
        raise InputError(f"`task`: {wrong[0]} is not one of the model's", hint)
    if not isinstance(task, int | None) and len(task) != n_rows:
        raise InputError(f"`task`: {len(task)} tasks for {n_rows} sequences", "give one for all, or one for each")


def row_tasks(model: Transformer, task: int | Sequence[int] | None, n_rows: int) -> Int[Tensor, " B"] | None:
    """The task of each of `n_rows` sequences, given one for all or each its own; None where the model has no tasks.

    Raises an InputError as `check_tasks` does.
    """
    check_tasks(model.config, task, n_rows)
    if not routes_by_task(model.config):
        return None
    each = [task or 0] * n_rows if task is None or isinstance(task, int) else list(task)
    return torch.tensor(each, dtype=torch.long, device=model.embedding.weight.device)


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
