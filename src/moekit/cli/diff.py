"""`moekit diff`: what differs between two model folders."""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from moekit.cli.console import say, show_table
from moekit.config.errors import InputError

if TYPE_CHECKING:
    from moekit.checkpoint.difference import Difference, TensorDifference
    from moekit.evaluate.difference import LogitDifference

SHOWN = 10
"""Tensors that are listed; --json has all."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("a", metavar="A", help="model folder: a run of moekit, or a Hugging Face MoE folder")
    add("b", metavar="B", help="the other one")
    add("--tokens", metavar="FILE", help="compare logits too: on UTF-8 text, or on token ids (1, 2, 3)")
    add("--limit", type=int, default=4096, metavar="N", help="tokens of it, at most (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the logits' models (%(default)s)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare and print; models that differ are no failure."""
    if args.limit < 1:
        raise InputError(f"--limit {args.limit}: must be above 0")

    from moekit.checkpoint.difference import compare  # noqa: PLC0415 - torch comes late

    # Logits first: what is wrong with the text or the vocabularies shows before all tensors are read.
    logits = None if args.tokens is None else _logits(args)
    with _progress("comparing tensors") as (progress, task):
        found = compare(
            Path(args.a), Path(args.b), lambda done, total: progress.update(task, completed=done, total=total)
        )
    if args.json:
        print(json.dumps(as_json(args.a, args.b, found, logits)))
    else:
        show(found, logits)
    return 0


def as_json(a: str, b: str, found: "Difference", logits: "LogitDifference | None") -> dict[str, Any]:
    """What scripts read; these names stay."""
    from moekit.checkpoint.parts import part_of  # noqa: PLC0415

    return {
        "a": a,
        "b": b,
        "identical": found.identical,
        "configuration": [field._asdict() for field in found.configuration],
        "tensors": [{"part": part_of(tensor.name), **tensor._asdict()} for tensor in found.tensors],
        "logits": None if logits is None else logits._asdict(),
    }


def show(found: "Difference", logits: "LogitDifference | None") -> None:
    """The report for a reader."""
    if found.configuration:
        rows = [(field.field, field.a or "-", field.b or "-") for field in found.configuration]
        show_table("configurations differ", ("field", "A", "B"), rows)
    show_table(
        "tensors by part; relative is ||a - b|| / ||a||",
        ("part", "tensors", "identical", "same values", "different", "others", "largest |a - b|", "relative"),
        part_rows(found.tensors),
    )
    different = sorted((each for each in found.tensors if each.state == "different"), key=_severity, reverse=True)
    if different:
        columns = ("tensor", "A", "B", "largest |a - b|", "mean", "relative")
        show_table(f"most different of {len(different)}", columns, map(_tensor_row, different[:SHOWN]))
    for line in odd_lines(found.tensors):
        print(line)
    if logits is not None:
        print(logit_words(logits))
    print("identical" if found.identical else summary(found))


def part_rows(tensors: "Iterable[TensorDifference]") -> list[tuple[str, ...]]:
    """For each part of the model: how many tensors are in which state, and the worst figures."""
    from moekit.checkpoint.parts import part_of  # noqa: PLC0415

    groups: dict[str, list[TensorDifference]] = {}
    for tensor in tensors:
        groups.setdefault(part_of(tensor.name), []).append(tensor)
    rows = []
    for part, group in groups.items():
        counts = Counter(tensor.state for tensor in group)
        known = [str(counts.pop(state, 0)) for state in ("identical", "same values", "different")]
        worst = [max((getattr(each, field) or 0.0 for each in group), default=0.0) for field in ("largest", "relative")]
        rows.append((part, str(len(group)), *known, str(counts.total()), *(f"{value:.3g}" for value in worst)))
    return rows


def odd_lines(tensors: "Iterable[TensorDifference]") -> Iterable[str]:
    """The tensors that only one side has, or that have other shapes."""
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.state in ("only in A", "only in B", "other shape"):
            shapes = " | ".join("-" if shape is None else str(list(shape)) for shape in tensor.shapes)
            groups.setdefault(tensor.state, []).append(f"{tensor.name} {shapes}")
    for state, lines in groups.items():
        yield f"{state}: {len(lines)}"
        yield from (f"  {line}" for line in lines[:SHOWN])
        if len(lines) > SHOWN:
            yield f"  ... and {len(lines) - SHOWN} more"


def logit_words(logits: "LogitDifference") -> str:
    """The comparison of logits in one line."""
    return (
        f"logits at {logits.positions} positions: largest |a - b| {logits.largest:.3g}, mean {logits.mean:.3g}; "
        f"KL(A || B) mean {logits.divergence:.3g}, largest {logits.largest_divergence:.3g} nats; "
        f"the same best token at {logits.agreement:.2%}"
    )


def summary(found: "Difference") -> str:
    """What differs, in one line."""
    counts = Counter(tensor.state for tensor in found.tensors)
    fields = [f"{len(found.configuration)} fields of the configuration"] if found.configuration else []
    states = [f"{count} {state}" for state, count in counts.items()]
    return f"not identical: {', '.join(fields + states)} of {len(found.tensors)} tensors"


def token_ids(text: str, a: str, b: str) -> list[int]:
    """The ids in `text`, or those that the tokenizer of the folder `a` makes of it; that of `b` must agree."""
    if re.fullmatch(r"[\d,\s]*\d[\d,\s]*", text):
        return [int(number) for number in re.split(r"[,\s]+", text) if number]
    from moekit.checkpoint.load import load_tokenizer  # noqa: PLC0415
    from moekit.data.tokenizer import FILE  # noqa: PLC0415

    ids = load_tokenizer(a).encode(text).ids
    if (Path(b) / FILE).exists() and load_tokenizer(b).encode(text).ids != ids:
        raise InputError(f"{b}: its tokenizer makes other ids of the text than that of {a}", "give token ids instead")
    return ids


def _logits(args: argparse.Namespace) -> "LogitDifference":
    import numpy as np  # noqa: PLC0415

    from moekit.checkpoint.load import load  # noqa: PLC0415
    from moekit.evaluate.difference import logit_difference  # noqa: PLC0415

    ids = token_ids(_read(Path(args.tokens)), args.a, args.b)[: args.limit]
    models = [load(path, dtype=args.dtype) for path in (args.a, args.b)]
    with _progress("comparing logits", len(ids)) as (progress, task):
        return logit_difference(models[0], models[1], np.array(ids, np.int64), lambda n: progress.advance(task, n))


def _read(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"--tokens {file}: {'is a folder' if file.is_dir() else 'no such file'}")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"--tokens {file}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"--tokens {file}: cannot be read ({error.strerror})") from None


@contextmanager
def _progress(what: str, total: int | None = None) -> "Iterator[tuple[Progress, TaskID]]":
    console = Console(stderr=True)
    if not console.is_terminal:
        say(what)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task(what, total=total)


def _severity(tensor: "TensorDifference") -> tuple[float, float]:
    relative = math.inf if tensor.relative is None else tensor.relative
    return relative, tensor.largest or 0.0


def _tensor_row(tensor: "TensorDifference") -> tuple[str, ...]:
    figures = (tensor.largest, tensor.mean, tensor.relative)
    kinds = (kind or "-" for kind in tensor.dtypes)
    return tensor.name, *kinds, *("-" if value is None else f"{value:.3g}" for value in figures)
