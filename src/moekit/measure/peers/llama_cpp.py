"""llama.cpp, through llama-cpp-python: reads tokens with a GGUF file, or starts as a process of its own to do so.

Knows no torch, so that such a process starts as fast as it can."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

NAME = "llama.cpp"

CONTEXT = 1024
"""Tokens that a model remembers."""

BATCH = 512
"""Tokens that are read at once."""


class Opened:
    """A GGUF file opened for tokens; use it in a `with`, which closes it."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp as llama  # noqa: PLC0415 - optional

        self.llama: Any = llama
        # Not by a callback of our own: llama.cpp would keep its address for longer than it lives.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        llama.llama_backend_init()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        room = llama.llama_context_default_params()
        room.n_ctx, room.n_batch, room.n_ubatch = CONTEXT, BATCH, BATCH
        room.n_threads = room.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, room)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)

    def forget(self) -> None:
        """Begin a new text."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def read(self, ids: Sequence[int]) -> None:
        """The logits after `ids`, which follow what was read before."""
        tokens = (self.llama.llama_token * len(ids))(*ids)
        if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not decode")
        self.llama.llama_synchronize(self.context)


def prompt_reading(path: Path, threads: int, ids: Sequence[int]) -> Callable[[], None]:
    """Reading `ids` as a new text."""
    model = Opened(path, threads)

    def work() -> None:
        model.forget()
        model.read(ids)

    return work


def decoding(path: Path, threads: int, beginning: Sequence[int]) -> Callable[[], None]:
    """Reading one more token, the first of `beginning`, behind that and those before."""
    model = Opened(path, threads)
    model.read(beginning)
    return lambda: model.read(beginning[:1])


def main(path: str, threads: str) -> None:
    """Open the file and read three tokens: a process up to its first token."""
    with Opened(Path(path), int(threads)) as model:
        model.read((1, 2, 3))


if __name__ == "__main__":
    main(*sys.argv[1:])
