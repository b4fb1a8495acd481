"""`moekit quantize`: a model folder in groups of 8- or 4-bit numbers, and what that costs."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moekit.cli.console import Written, say, show_table
from moekit.cli.eval import Data, Row, Windows, configure_data, evaluate_all, held_out, read_all, windows_of
from moekit.config.errors import InputError
from moekit.config.quantisation import BITS, GROUP_SIZES, Groups

if TYPE_CHECKING:
    from moekit.checkpoint.quantize import PartBytes, Quantised

LOSSES = ("text", "loss", "after", "difference", "bits per byte", "after", "perplexity", "after")

SHOWN = 5
"""Kept tensors that are listed; --json has all."""


class Question(NamedTuple):
    """The texts whose loss is to be told before and after, and their windows."""

    texts: list[Data]
    windows: Windows
    task: int | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("path", metavar="PATH", help="model folder: a run of moekit, or a Hugging Face MoE folder")
    add("out", metavar="OUT", nargs="?", help="folder to write; must not exist (PATH-4bit, beside it)")
    add("--bits", type=int, choices=BITS, required=True, help="of a number")
    add("--group", type=int, choices=GROUP_SIZES, default=64, help="numbers with one scale (%(default)s)")
    add(
        "--keep",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="leave as they are: a shell pattern of tensors' names, or a part such as attention or 'shared experts'",
    )
    configure_data(parser)
    add("--no-loss", action="store_true", help="do not evaluate the model before and after")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Quantise, evaluate both folders, print."""
    source = Path(args.path)
    target = Path(args.out) if args.out else source.with_name(f"{source.resolve().name}-{args.bits}bit")
    # What is wrong with the texts shows before all weights are read.
    question = None if args.no_loss else _question(args)

    from moekit.checkpoint.quantize import quantize  # noqa: PLC0415 - torch comes late

    started = time.monotonic()
    groups = Groups(args.bits, args.group, tuple(args.keep))
    with Written() as written:
        done = quantize(source, target, groups, on_bytes=written.update)
    seconds = time.monotonic() - started
    losses = [] if question is None else _losses(question, source, target)
    if args.json:
        print(json.dumps({"path": str(target), **as_json(done, losses), "seconds": seconds}))
    else:
        _show(target, done, losses, seconds)
    return 0


def as_json(done: "Quantised", losses: list[tuple[Row, Row]]) -> dict[str, Any]:
    """What scripts read; these names stay."""
    return {
        "parts": [part._asdict() for part in done.parts],
        "undivided": done.undivided,
        "data": [
            {
                "name": before.data.name,
                "file": before.data.path,
                **{when: row.evaluation._asdict() for when, row in (("before", before), ("after", after))},
                "difference": after.evaluation.loss - before.evaluation.loss,
            }
            for before, after in losses
        ],
    }


def _question(args: argparse.Namespace) -> Question | None:
    """None, with a word about it, where there is nothing that could be asked."""
    from moekit.checkpoint.load import load_tokenizer  # noqa: PLC0415
    from moekit.data.tokenizer import FILE as TOKENIZER  # noqa: PLC0415

    if args.data:
        load_tokenizer(args.path)
        texts = read_all(args.data)
    elif not (Path(args.path) / TOKENIZER).is_file():
        say("note: no loss before and after, since there is no tokenizer beside the model")
        return None
    else:
        try:
            texts = held_out(args.path)
        except InputError as error:
            say(f"note: no loss before and after: {error}; {error.hint}")
            return None
    return Question(texts, windows_of(args), args.task)


def _losses(question: Question, *folders: Path) -> list[tuple[Row, Row]]:
    """Each text evaluated by both models."""
    from moekit.checkpoint.load import load, load_tokenizer  # noqa: PLC0415

    # The tokenizer and the run's domains are those of the first folder; the second has no run.json.
    home, tokenizer = str(folders[0]), load_tokenizer(folders[0])
    before, after = (
        evaluate_all(home, load(folder), tokenizer, question.texts, question.windows, task=question.task)
        for folder in folders
    )
    return list(zip(before, after, strict=True))


def _show(target: Path, done: "Quantised", losses: list[tuple[Row, Row]], seconds: float) -> None:
    columns = ("part", "numbers", "bytes before", "bytes after", "bits before", "bits after")
    whole = type(done.parts[0])("all", *(sum(figures) for figures in list(zip(*done.parts, strict=True))[1:]))
    show_table("bytes by part, and bits for each number", columns, map(_part_cells, [*done.parts, whole]))
    if done.undivided:
        names = ", ".join(done.undivided[:SHOWN]) + (", ..." if len(done.undivided) > SHOWN else "")
        print(f"kept, since the group does not divide their rows: {names}")
    if losses:
        show_table(
            "nats and bits per byte of held-out text before, and after", LOSSES, (_loss_cells(*pair) for pair in losses)
        )
    print(f"{target}: {whole.after / 1e9:.3g} GB of {whole.before / 1e9:.3g} GB, {seconds:.1f} s")


def _part_cells(part: "PartBytes") -> tuple[str, ...]:
    bits = (f"{8 * size / max(part.numbers, 1):.2f}" for size in (part.before, part.after))
    return part.part, f"{part.numbers:,}", f"{part.before:,}", f"{part.after:,}", *bits


def _loss_cells(before: Row, after: Row) -> tuple[str, ...]:
    old, new = before.evaluation, after.evaluation
    difference = new.loss - old.loss
    bits = (f"{old.bits_per_byte:.4f}", f"{new.bits_per_byte:.4f}")
    perplexities = (f"{old.perplexity:.3f}", f"{new.perplexity:.3f}")
    relative = f"{difference:+.4f} ({difference / old.loss:+.2%})"
    return before.data.name, f"{old.loss:.4f}", f"{new.loss:.4f}", relative, *bits, *perplexities
