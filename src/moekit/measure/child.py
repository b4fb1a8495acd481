"""Run work in a process of its own, and see how much memory it takes beyond what the process had before."""

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Measured(NamedTuple):
    """What the work returned, the bytes it had at most in memory at a time, and what the process had before."""

    result: Any
    peak_bytes: int
    library_bytes: int


def in_child(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    small: tuple[Any, ...],
    then: Callable[[Any], Any] | None = None,
) -> Measured:
    """Call `work`, a function of a module, in a fresh process; with `small` first, whose memory does not count.

    The first time, libraries load what they need and make their pools. `then`, where it is given, makes the result of
    what the work returned, in that process, and its memory does not count either. Raises RuntimeError if it dies.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(theirs, torch.get_num_threads(), work, arguments, small, then))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the measured work died (exit status {child.exitcode}): out of memory?") from None
    child.join()
    if isinstance(found, BaseException):
        raise found
    return found


def _run(
    pipe: Connection,
    threads: int,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    small: tuple[Any, ...],
    then: Callable[[Any], Any] | None,
) -> None:
    try:
        torch.set_num_threads(threads)
        work(*small)
        gc.collect()
        # The kernel forgets the peak so far; what libraries took for a moment while they were loaded does not count.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_status("VmRSS")
        result = work(*arguments)
        peak = memory_status("VmHWM") - before
        pipe.send(Measured(result if then is None else then(result), peak, before))
    except Exception as error:
        pipe.send(error)


def memory_status(key: str) -> int:
    """Bytes that the kernel names: VmRSS, in memory now; VmHWM, in memory at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
