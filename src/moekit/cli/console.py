"""What the command line shows: tables on stdout, progress and remarks on stderr."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

QUIET_SECONDS = 10.0
"""Without a terminal, one line of progress in this time."""


def say(text: str) -> None:
    """A remark, to stderr."""
    print(text, file=sys.stderr, flush=True)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table, to stdout: the first column holds names, the others figures."""
    table = Table(header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without a terminal rich would assume 80 columns and fold figures.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=160, highlight=False)
    console.print(title, style="bold", markup=False)
    console.print(table)


class Steps:
    """Progress of `total` steps: a live bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.first, self.clock = total, done, clock
        self.started = self.spoken = clock()
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TaskProgressColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
            self.bar = Progress(*columns, *times, console=self.console)
            self.task = self.bar.add_task("", total=total, completed=done, figures="")
            self.bar.start()

    def update(self, done: int, figures: str) -> None:
        """`done` steps are over; `figures` says how it goes."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, figures=figures)
            return
        now = self.clock()
        if now - self.spoken >= QUIET_SECONDS or done == self.total:
            self.spoken = now
            left = (now - self.started) / max(done - self.first, 1) * (self.total - done)
            say(f"step {done}/{self.total}  {figures}  {left:.0f} s left")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()


class Written:
    """Progress of writing: a live bar on a terminal, else a line now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.started = self.spoken = clock()
        console = Console(stderr=True, highlight=False)
        columns = (DownloadColumn(), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("")

    def __enter__(self) -> "Written":
        self.bar.start()
        return self

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are written."""
        self.bar.update(self.task, completed=done, total=total)
        now = self.clock()
        if self.bar.disable and now - self.spoken >= QUIET_SECONDS:
            self.spoken = now
            left = (now - self.started) / max(done, 1) * (total - done)
            say(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB written, {left:.0f} s left")

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
