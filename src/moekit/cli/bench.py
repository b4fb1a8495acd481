"""`moekit bench`: what this machine does in training, prefill and decoding, beside other programs and its limits."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli.console import say, show_table
from moekit.config.errors import InputError
from moekit.measure.bench.names import ALL, KINDS, named
from moekit.measure.peers.installed import PEERS, install_command, missing

if TYPE_CHECKING:
    from moekit.measure.bench.suite import Result

NO_PEER = "none"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("work", nargs="*", metavar="WORK", help=f"{', '.join(KINDS)}, all (the default), or of these: {', '.join(ALL)}")
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"compare with it: {', '.join(PEERS)}, or {NO_PEER}; repeatable (all that are installed)",
    )
    add("--threads", type=int, metavar="N", help="threads of every program (as many as torch takes)")
    add("--quick", action="store_true", help="tiny shapes, to see that it runs; the figures mean nothing")
    add("--save", metavar="FOLDER", help="write DATE-PROCESSOR.md and .json there, in place of those of the same day")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, save, print."""
    works = _works(args.work)
    peers, absent = _peers(args.peer)
    _check_save(args)
    _set_threads(args.threads)
    for peer in absent:
        say(f"{peer} is not installed, and left out: {install_command(peer)}")
    from moekit.cli.bench_text import lines, table, write  # noqa: PLC0415 - torch comes late
    from moekit.measure.bench.suite import bench  # noqa: PLC0415

    result = bench(works, peers, args.quick, say)
    printed = as_json(result, absent, args.quick)
    if args.save is not None:
        say(f"saved: {write(Path(args.save), result, absent, printed)}")
    if args.json:
        print(json.dumps(printed, ensure_ascii=False, allow_nan=False))
        return 0
    title = "tiny shapes: these figures mean nothing" if args.quick else "medians of turns taken by all programs"
    show_table(title, *table(result))
    print("\n".join(lines(result)))
    return 0


def _works(wanted: list[str]) -> tuple[str, ...]:
    try:
        return named(wanted or ["all"])
    except KeyError as error:
        hint = f"works: all, {', '.join((*KINDS, *ALL))}"
        raise InputError(f"there is no work called {error.args[0]}", hint) from None


def _peers(wanted: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The peers to compare with, and those that are left out because they are not installed."""
    for name in wanted:
        if name not in PEERS and name != NO_PEER:
            raise InputError(f"--peer {name}: is not known", f"peers: {', '.join(PEERS)}, or {NO_PEER}")
        if name in PEERS and missing(name):
            raise InputError(f"--peer {name}: {' and '.join(missing(name))} not installed", install_command(name))
    if NO_PEER in wanted and len(set(wanted)) > 1:
        raise InputError(f"--peer {NO_PEER}: stands alone", "leave out the other peers")
    if wanted:
        return tuple(name for name in PEERS if name in wanted), ()
    absent = tuple(name for name in PEERS if missing(name))
    return tuple(name for name in PEERS if name not in absent), absent


def _check_save(args: argparse.Namespace) -> None:
    if args.save is None:
        return
    if args.quick:
        raise InputError("--save: figures of --quick mean nothing", "leave one of them out")
    if Path(args.save).exists() and not Path(args.save).is_dir():
        raise InputError(f"--save {args.save}: is a file", "name a folder")


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads {threads}: must be above 0")
    # Libraries read it when they are loaded, and child processes inherit it.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch  # noqa: PLC0415 - only when it is needed

    torch.set_num_threads(threads)


def as_json(result: "Result", absent: tuple[str, ...], quick: bool) -> dict[str, object]:
    """What scripts read; these names stay."""
    left_out = [{"peer": peer, "install": install_command(peer)} for peer in absent]
    return {**result.as_json(), "missing": left_out, "quick": quick}
