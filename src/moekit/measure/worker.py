"""A process that does one kind of work whenever it is told to: so that two programs can take turns, each with memory of
its own."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from moekit.measure.child import memory_status


class Worker:
    """Calls `make`, a function of a module, in a fresh process; what it returns is done once at each `turn`.

    Use it in a `with`, which ends the process. All methods raise what the work raises, or RuntimeError if it dies.
    """

    def __init__(self, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), make, arguments))
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Worker":
        self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()
        self.pipe.close()

    def turn(self) -> float:
        """Do the work once; the seconds that it took."""
        return self._asked("turn")

    def peak_bytes(self) -> int:
        """What the process had at most in memory since its start, libraries included, as the system counts."""
        return self._asked("peak")

    def _asked(self, what: str) -> Any:
        self.pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            found = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise RuntimeError(
                f"the measured work died (exit status {self.process.exitcode}): out of memory?"
            ) from None
        if isinstance(found, BaseException):
            raise found
        return found


def _serve(
    pipe: Connection, threads: int, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(threads)
        work = make(*arguments)
        pipe.send(None)
        while True:
            if pipe.recv() == "peak":
                pipe.send(memory_status("VmHWM"))
                continue
            start = time.perf_counter()
            work()
            pipe.send(time.perf_counter() - start)
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
