"""Continue token ids with a model and its cache."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.evaluate.loss import row_tasks
from moekit.generation.sampling import SamplingConfig, next_token
from moekit.model.mode import evaluation_mode
from moekit.model.transformer import Transformer
from moekit.tensors import Bool, Int, Tensor

OnToken = Callable[[Int[Tensor, " B"]], bool | None]
"""Hears each new token of every row; returns True to end."""


class Speed(NamedTuple):
    """Tokens per second over the whole batch; None where there was nothing to measure.

    Prefill is the prompt up to the first new token, decode the new tokens after that one.
    """

    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


class Generated(NamedTuple):
    """The prompts with the new tokens behind them, and how fast that went."""

    ids: Int[Tensor, "B total"]
    speed: Speed


def generate(  # noqa: PLR0913, PLR0917 - one flat list of options is what callers expect of this name
    model: Transformer,
    ids: Int[Tensor, "B S"],
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    mask: Bool[Tensor, "B S"] | None = None,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    task: int | Sequence[int] | None = None,
) -> Int[Tensor, "B total"]:
    """Prompts [B, S] and new tokens, [B, S + max_new_tokens]; fewer once every row has met a stop id.

    Temperature 0 is greedy; the other sampling options are those of `SamplingConfig`. `mask` is False at padding,
    which stands on the left. A row that has met a stop id is filled with it. `on_token` hears each new token of
    every row and may return True to end. `task` is that of all rows, or one for each, where the model routes by task.
    """
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    return extend(model, ids, max_new_tokens, sampling, seed, mask, stop_ids, on_token, task=task).ids


def extend(  # noqa: PLR0913 - the arguments of `generate`
    model: Transformer,
    ids: Int[Tensor, "B S"],
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int = 0,
    mask: Bool[Tensor, "B S"] | None = None,
    stop_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    *,
    task: int | Sequence[int] | None = None,
) -> Generated:
    """As `generate`, with the sampling options as one value and the speed in the result."""
    check_prompt(model, ids, mask)
    if max_new_tokens < 0:
        raise InputError(f"`max_new_tokens`: {max_new_tokens} must not be negative")
    (n_rows, n_prompt), device = ids.shape, ids.device
    tasks = row_tasks(model, task, n_rows)
    n_real = ids.numel() if mask is None else int(mask.sum())
    room = F.pad(ids.long(), (0, max_new_tokens))
    real = None if mask is None else F.pad(mask, (0, max_new_tokens), value=True)
    generator = torch.Generator(device).manual_seed(seed)
    stops, stopped = frozenset(stop_ids), [False] * n_rows
    fresh, marks = ids, [_now(device)]
    with evaluation_mode(model):
        cache = model.new_cache(n_prompt + max_new_tokens)
        for end in range(n_prompt, n_prompt + max_new_tokens):
            # Only the last state meets the head: [B S V] of a long prompt would be gigabytes.
            logits = model.head(model.hidden(fresh, cache, mask, tasks).states[:, -1])
            seen = None if real is None else real[:, :end]
            token = next_token(logits, sampling, room[:, :end], seen, generator)
            if any(stopped):
                token = torch.where(torch.tensor(stopped, device=device), room[:, end - 1], token)
            if stops:
                stopped = [old or new in stops for old, new in zip(stopped, token.tolist(), strict=True)]
            room[:, end] = token
            marks.append(_now(device))
            if (on_token is not None and on_token(token)) or all(stopped):
                break
            fresh, mask = token.unsqueeze(1), None
    n_new = len(marks) - 1
    return Generated(room[:, : n_prompt + n_new].contiguous(), _speed(marks, n_real, n_rows))


def check_prompt(model: Transformer, ids: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None) -> None:
    """Raise an InputError unless the model can read the prompts."""
    if ids.numel() == 0:
        raise InputError("the prompt is empty", "give at least one token")
    check_causal(model.config)
    size = model.config.vocab_size
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= size:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"token id {wrong} is outside the model's vocabulary", f"ids go from 0 to {size - 1}")
    if mask is None:
        return
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("`mask`: padding must stand on the left of a prompt, and a prompt needs at least one token")


def check_causal(config: ModelConfig) -> None:
    """Raise an InputError where a token's experts depend on later tokens: these are not there yet."""
    routing = config.moe.routing
    if config.moe_layers and not routing.causal:
        hint = "train it with model.moe.routing.decode = threshold" if hasattr(routing, "decode") else ""
        raise InputError(f"{routing.kind} routing looks at later tokens, so that this model cannot generate", hint)
    capacity = config.moe.capacity
    if config.moe_layers and capacity is not None and capacity.in_evaluation:
        message = "capacities that drop outside training depend on later tokens, so that this model cannot generate"
        raise InputError(message, "set model.moe.capacity.in_evaluation to false in its config.json")


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _speed(marks: list[float], prompt_tokens: int, n_rows: int) -> Speed:
    """`marks` are the times of the start and of each new token."""
    n_new = len(marks) - 1
    if n_new == 0:
        return Speed(None, None)
    prefill = prompt_tokens / max(marks[1] - marks[0], 1e-9)
    decode = n_rows * (n_new - 1) / max(marks[-1] - marks[1], 1e-9) if n_new > 1 else None
    return Speed(prefill, decode)
