"""Programs that take turns, each in a process of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from moekit.measure.bench.turns import Entrant
from moekit.measure.worker import Worker


class Job(NamedTuple):
    """Work of a program: `make`, a function of a module, is called with `arguments` where the work is to be done."""

    program: str
    variant: str
    make: Callable[..., Callable[[], object]]
    arguments: tuple[Any, ...]


@contextmanager
def in_processes(jobs: Sequence[Job], amount: float) -> Iterator[dict[Entrant, Worker]]:
    """Who takes part, each doing `amount` of the row's unit at a turn, and its process, which lives as long as this."""
    with ExitStack() as living:
        found = dict[Entrant, Worker]()
        for job in jobs:
            worker = living.enter_context(Worker(job.make, job.arguments))
            found[Entrant(job.program, job.variant, amount, worker.turn)] = worker
        yield found
