"""Text in, text out: prompts of any length together, stop ids and stop strings, text as it is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from moekit.config.errors import InputError
from moekit.evaluate.text import start_id
from moekit.generation.generate import Speed, extend
from moekit.generation.sampling import SamplingConfig
from moekit.generation.stream import StopFilter, TokenStream
from moekit.model.transformer import Transformer
from moekit.tensors import Bool, Int, Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """What ends a text: an id, such as the end-of-text token, or a string, which is cut off."""

    ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


class Completion(NamedTuple):
    """One prompt's ids with the new ones behind, up to what stopped them, and the new text; None without tokenizer."""

    ids: list[int]
    text: str | None


class Completions(NamedTuple):
    """One completion for each prompt, in order, and how fast they came."""

    rows: tuple[Completion, ...]
    speed: Speed


class Padded(NamedTuple):
    """Prompts of different length as one batch; the mask is False at padding. None: there is no padding."""

    ids: Int[Tensor, "B S"]
    mask: Bool[Tensor, "B S"] | None


def complete(  # noqa: PLR0913 - the arguments of `extend`, as text
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int = 0,
    stop: Stop = Stop(),
    on_text: Callable[[int, str], None] | None = None,
    *,
    task: int | Sequence[int] | None = None,
) -> Completions:
    """Continue each prompt until it meets a stop, or for `max_new_tokens`. Greedy text is that of each prompt alone.

    `on_text` hears the number of a prompt and its new text: whole characters that no stop string will cut off.
    Without a tokenizer there are ids only. `task` is that of all prompts, or one for each, where the model routes by
    task.
    """
    if tokenizer is None and stop.strings:
        raise InputError("stop strings need a tokenizer")
    rows = [_Row(tokenizer, prompt, stop) for prompt in prompts]

    def tell(index: int, text: str) -> None:
        if on_text is not None and text:
            on_text(index, text)

    def on_token(tokens: Int[Tensor, " B"]) -> bool:
        for index, token in enumerate(tokens.tolist()):
            tell(index, rows[index].push(token))
        return all(row.done for row in rows)

    ids, mask = pad_left(prompts, model.embedding.weight.device)
    speed = extend(model, ids, max_new_tokens, sampling, seed, mask, stop.ids, on_token, task=task).speed
    for index, row in enumerate(rows):
        tell(index, row.finish())
    return Completions(tuple(Completion(row.ids, row.text if tokenizer else None) for row in rows), speed)


def encode_prompt(tokenizer: Tokenizer, text: str, stop_ids: tuple[int, ...] = ()) -> list[int]:
    """The ids of a prompt, with what the tokenizer itself puts before a text; an empty one begins a new text."""
    return tokenizer.encode(text).ids or [start_id(tokenizer, stop_ids)]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Padded:
    """Put prompts of any length side by side, so that all end at the same place."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise InputError("the prompt is empty", "give at least one token")
    longest = max(lengths)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    if min(lengths) == longest:
        return Padded(ids, None)
    padding = longest - torch.tensor(lengths, device=device).unsqueeze(1)
    return Padded(ids, torch.arange(longest, device=device) >= padding)


class _Row:
    """One prompt's way: ids, text, and whether it has met a stop."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop: Stop) -> None:
        self.ids = list(prompt)
        self.text = ""
        self.done = False
        self.stop_ids = stop.ids
        self.stream = None if tokenizer is None else TokenStream(tokenizer, prompt)
        self.filter = StopFilter(stop.strings)

    def push(self, token: int) -> str:
        """The text that is certain now."""
        if self.done:
            return ""
        self.ids.append(token)
        if token in self.stop_ids:
            return self.finish()
        return self._say(self.filter.push("" if self.stream is None else self.stream.push(token)))

    def finish(self) -> str:
        """All text that is left; nothing where the row is done."""
        if self.done:
            return ""
        text = self._say(self.filter.push("" if self.stream is None else self.stream.finish()))
        text += self._say(self.filter.finish())
        self.done = True
        return text

    def _say(self, text: str) -> str:
        self.text += text
        self.done = self.filter.stopped
        return text
