"""`moekit eval`: how well a model folder predicts texts, beside what compressors need."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moekit.cli.console import say, show_table
from moekit.config.errors import InputError
from moekit.config.files import read_json
from moekit.config.routing import TaskRouting

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moekit.evaluate.text import Evaluation
    from moekit.model.transformer import Transformer

LONGEST = 1024
"""Window without --sequence-length, where the model is made for more: attention's cost grows with its square."""

COLUMNS = ("text", "model", "interval", "gzip -9", "xz -9", "loss", "perplexity", "tokens", "bytes")

FP8_COLUMNS = ("loss, FP8 simulated", "difference")


class Data(NamedTuple):
    """One text to evaluate."""

    name: str
    path: str
    text: str


class Windows(NamedTuple):
    """How texts are cut: tokens in a window, from window to window, and windows at a time."""

    length: int
    stride: int
    batch: int


class Row(NamedTuple):
    """What is known of one text; `fp8` is the evaluation with FP8 simulated, where that was asked for."""

    data: Data
    evaluation: "Evaluation"
    compressors: dict[str, float]
    fp8: "Evaluation | None" = None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("path", metavar="PATH", help="model folder: a run of moekit, or a Hugging Face MoE folder")
    configure_data(parser)
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as the folder stores it")
    add("--fp8", action="store_true", help="also with weights and activations rounded to FP8 (simulated)")
    add("--json", action="store_true", help="print one JSON object")


def configure_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which texts are predicted, and in which windows."""
    add = parser.add_argument
    add(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="UTF-8 text to predict; repeatable (the run's own)",
    )
    add("--sequence-length", type=int, metavar="N", help=f"tokens in a window (as in training, else {LONGEST} at most)")
    add("--stride", type=int, metavar="N", help="tokens from window to window (half a window); less: more context")
    add("--batch", type=int, default=8, metavar="N", help="windows at a time (%(default)s)")
    add("--task", type=int, metavar="N", help="task of all texts, where the model routes by task (the domain's)")


def run(args: argparse.Namespace) -> int:
    """Read the texts, evaluate each, print."""
    texts = read_all(args.data) if args.data else held_out(args.path)
    windows = windows_of(args)

    from moekit.checkpoint.load import load, load_tokenizer  # noqa: PLC0415 - torch comes late
    from moekit.cli.device import prepare_device  # noqa: PLC0415

    tokenizer = load_tokenizer(args.path)
    prepare_device(args.device)
    model = load(args.path, dtype=None if args.dtype == "auto" else args.dtype, device=args.device)
    rows = evaluate_all(args.path, model, tokenizer, texts, windows, args.fp8, args.task)
    if args.json:
        shape = {"sequence_length": windows.length, "stride": windows.stride}
        print(json.dumps({"path": args.path, **shape, "data": [_as_json(row) for row in rows]}))
    else:
        what = f"bits per byte of text in windows of {windows.length} tokens"
        title = f"{what}, with the model's 95 % interval; fewer is better"
        show_table(title, COLUMNS + FP8_COLUMNS * args.fp8, map(_as_cells, rows))
    return 0


def windows_of(args: argparse.Namespace) -> Windows:
    """The windows asked for, or else those that suit the model."""
    for key in ("sequence_length", "stride", "batch"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise InputError(f"--{key.replace('_', '-')} {value}: must be above 0")

    from moekit.checkpoint.load import load_config  # noqa: PLC0415

    length = args.sequence_length or trained_length(args.path) or min(load_config(args.path).max_positions, LONGEST)
    return Windows(length, args.stride or max(length // 2, 1), args.batch)


def evaluate_all(
    path: str,
    model: "Transformer",
    tokenizer: "Tokenizer",
    texts: list[Data],
    windows: Windows,
    fp8: bool = False,
    task: int | None = None,
) -> list[Row]:
    """Evaluate each text in windows; with `fp8` twice.

    Where the model routes by task, that of a text is `task`, or else the number of the run's domain of its name.
    """
    from moekit.checkpoint.load import stop_ids  # noqa: PLC0415
    from moekit.evaluate.baseline import compressed_bits_per_byte  # noqa: PLC0415
    from moekit.evaluate.text import start_id  # noqa: PLC0415
    from moekit.model.fp8 import simulated_fp8  # noqa: PLC0415

    routing = model.config.moe.routing
    if model.moe_layers() and not routing.causal:
        say(f"note: {routing.kind} routing sees later tokens, so that these figures compare with no other model's")
    start = start_id(tokenizer, stop_ids(path))
    tokens = [_encode(tokenizer, data) for data in texts]
    tasks = [task] * len(texts) if task is not None else text_tasks(path, model, texts)
    given = list(zip(tokens, texts, tasks, strict=True))
    found = [_evaluate(model, ids, data, start, windows, own) for ids, data, own in given]
    rows = [Row(data, one, compressed_bits_per_byte(data.text)) for data, one in zip(texts, found, strict=True)]
    if not fp8:
        return rows
    say("and again, with FP8 simulated")
    with simulated_fp8(model):
        return [
            row._replace(fp8=_evaluate(model, ids, data, start, windows, own))
            for row, (ids, data, own) in zip(rows, given, strict=True)
        ]


def text_tasks(path: str, model: "Transformer", texts: list[Data]) -> list[int | None]:
    """The number of the run's domain that each text is named after; None where the model does not route by task."""
    routing = model.config.moe.routing
    if not (model.moe_layers() and isinstance(routing, TaskRouting)):
        return [None] * len(texts)
    known = domains(path)
    strange = next((data for data in texts if data.name not in known), None)
    if strange is not None and routing.n_tasks > 1:
        names = f"; call it {' or '.join(known)}" if known else ""
        raise InputError(f"{strange.path}: this model routes by task; whose text is it?", f"give --task N{names}")
    return [known.index(data.name) if data.name in known else None for data in texts]


def domains(path: str) -> list[str]:
    """The domains that a run of moekit was trained on, in their order; none for other folders."""
    sources = _run_data(path).get("sources")
    listed = sources if isinstance(sources, list) else []
    return [str(source.get("domain")) for source in listed if isinstance(source, dict)]


def held_out(path: str) -> list[Data]:
    """The validation texts of a run of moekit, in the order of its domains."""
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder", "give the folder of a model")
    known = domains(path)
    order = {name: number for number, name in enumerate(known)}
    files = (Path(path) / "validation").glob("*.txt")
    files = sorted(files, key=lambda file: (order.get(file.stem, len(known)), file.name))
    if not files:
        raise InputError("there is no text to evaluate", "name one: --data valid.txt")
    return [read(str(file)) for file in files]


def trained_length(path: str) -> int | None:
    """The length of the sequences that a run of moekit was trained on; small models fail beyond it."""
    length = _run_data(path).get("sequence_length")
    return length if type(length) is int and length > 0 else None


def _run_data(path: str) -> dict[str, Any]:
    """The section `data` of `run.json`, where there is one."""
    file = Path(path) / "run.json"
    data = read_json(file).get("data") if file.is_file() else None
    return data if isinstance(data, dict) else {}


def read_all(options: list[str]) -> list[Data]:
    """The texts of all `--data` options; their names must differ."""
    texts = [read(option) for option in options]
    names = [data.name for data in texts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two texts are called `{twice}`", "name each: --data NAME=FILE")
    return texts


def read(option: str) -> Data:
    """The text of `NAME=FILE` or `FILE`; the name is the file's where none is given."""
    name, equals, path = option.partition("=")
    if not equals or Path(option).exists():
        name, path = Path(option).stem, option
    file = Path(path)
    if not path or not file.is_file():
        raise InputError(
            f"{path or f'--data {option}'}: {'is a folder' if file.is_dir() else 'no such file'}",
            "name a UTF-8 text file",
        )
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not text:
        raise InputError(f"{path}: is empty")
    return Data(name, path, text)


def _encode(tokenizer: "Tokenizer", data: Data) -> list[int]:
    ids = tokenizer.encode(data.text, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != data.text:
        say(f"note: the tokenizer does not keep all of {data.path}; what it drops counts as predicted for free")
    return ids


def _evaluate(
    model: "Transformer", ids: list[int], data: Data, start: int, windows: Windows, task: int | None
) -> "Evaluation":
    import numpy as np  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    from moekit.evaluate.text import evaluate_tokens  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        say(f"evaluating {data.name}: {len(ids)} tokens")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(data.name, total=len(ids))
        size = len(data.text.encode())
        return evaluate_tokens(
            model, np.array(ids), size, start, *windows, on_tokens=lambda n: progress.advance(bar, n), task=task
        )


def _as_json(row: Row) -> dict[str, object]:
    found = row.evaluation
    fp8 = {} if row.fp8 is None else {"fp8": {"loss": row.fp8.loss, "difference": row.fp8.loss - found.loss}}
    return {"name": row.data.name, "file": row.data.path, **found._asdict(), **row.compressors, **fp8}


def _as_cells(row: Row) -> list[str]:
    found = row.evaluation
    interval = "too short" if found.interval is None else f"{found.interval.low:.3f} to {found.interval.high:.3f}"
    bits = [f"{found.bits_per_byte:.3f}", interval, *(f"{value:.3f}" for value in row.compressors.values())]
    more = [f"{found.loss:.4f}", f"{found.perplexity:.2f}", str(found.tokens), str(found.bytes)]
    if row.fp8 is not None:
        difference = row.fp8.loss - found.loss
        more += [f"{row.fp8.loss:.4f}", f"{difference:+.4f} ({difference / found.loss:+.2%})"]
    return [row.data.name, *bits, *more]
