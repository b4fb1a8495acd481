"""From a stream of tokens to a stream of text: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from moekit.config.errors import InputError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of bytes that are not, or not yet, a character."""

CONTEXT = 8
"""Prompt tokens that the first new token is decoded behind: some decoders drop the space at the start of a text."""


class TokenStream:
    """Decodes tokens one at a time; what it gave out is never taken back. `prompt` is context and is not given out.

    Text that ends in an incomplete character is held back: byte-level tokenizers split characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt[-CONTEXT:])
        if self._decode().endswith(INCOMPLETE):
            # The prompt stops within a character, which cannot be told apart from the rest of it.
            self.ids = []
        self.given = len(self.ids)

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        self.ids.append(token)
        return "" if self._decode().endswith(INCOMPLETE) else self._take()

    def finish(self) -> str:
        """What was held back."""
        return self._take()

    def _take(self) -> str:
        known = self.tokenizer.decode(self.ids[: self.given])
        text = self._decode()[len(known) :]
        self.ids = self.ids[self.given :]
        self.given = len(self.ids)
        return text

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids)


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may become one.

    Where stop strings overlap, the one that is complete first counts; of those complete together, the longest. So
    the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise InputError("a stop string is empty", "it would stop every text before it begins")
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not shown before."""
        if self.stopped:
            return ""
        text = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        safe = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back and became no stop string."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The most characters at the end of `text` with which `stop` begins."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
