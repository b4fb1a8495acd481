"""`moekit report`: one HTML page on a run, with the same figures as JSON and the samples as text."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.cli.console import say, show_table
from moekit.cli.eval import Data, Row, Windows, evaluate_all, held_out, text_tasks, trained_length
from moekit.config.errors import InputError
from moekit.config.files import read_json
from moekit.report.page import render
from moekit.report.record import to_json
from moekit.report.values import Compression, ExpertUse, Report, Sample, average

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moekit.model.transformer import Transformer

PROMPT_TOKENS = 24
SAMPLE_TOKENS = 120


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("path", metavar="RUN", help="folder of a training run")
    add("--out", metavar="DIR", help="folder for report.html, report.json and samples.txt (RUN)")
    add("--temperature", type=float, default=0.7, help="of the samples (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--device", default="cpu", help="where to compute (%(default)s)")
    add("--json", action="store_true", help="print the report's figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluate, trace, let the model write, draw."""
    folder, out = Path(args.path), Path(args.out or args.path)
    if not (folder / "run.json").is_file():
        raise InputError(f"{folder}: no training run in it", "give the --out folder of moekit train")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is not a folder")
    if not 0 <= args.temperature < math.inf:
        raise InputError(f"--temperature {args.temperature}: must be a number from 0")
    report = build(args, folder)
    out.mkdir(parents=True, exist_ok=True)
    figures = to_json(report)
    (out / "report.html").write_text(render(report), "utf-8")
    (out / "report.json").write_text(json.dumps(figures, ensure_ascii=False, allow_nan=False), "utf-8")
    (out / "samples.txt").write_text("\n\n".join(map(_as_text, report.samples)) + "\n", "utf-8")
    if args.json:
        print(json.dumps(figures, ensure_ascii=False))
        return 0
    rows = [*report.compression, average(report.compression)]
    cells = [[row.domain, *(f"{value:.3f}" for value in (row.bits_per_byte, row.gzip, row.xz))] for row in rows]
    show_table("bits per byte of held-out text; fewer is better", ("domain", "model", "gzip -9", "xz -9"), cells)
    for name, path in (("report", out / "report.html"), ("checkpoint", folder), ("samples", out / "samples.txt")):
        print(f"{name}: {path}")
    return 0


def build(args: argparse.Namespace, folder: Path) -> Report:
    """All that the page shows."""
    import numpy as np  # noqa: PLC0415 - torch and what needs it come late

    from moekit.analyze.domains import trace  # noqa: PLC0415
    from moekit.analyze.experts import expert_use  # noqa: PLC0415
    from moekit.checkpoint.load import load, load_tokenizer  # noqa: PLC0415
    from moekit.cli.device import prepare_device  # noqa: PLC0415
    from moekit.train.metrics import METRICS, read_metrics  # noqa: PLC0415

    prepare_device(args.device)
    model, tokenizer = load(folder, device=args.device), load_tokenizer(folder)
    texts = held_out(str(folder))
    # Tracing takes a text's place for its task.
    if any(task not in (None, place) for place, task in enumerate(text_tasks(str(folder), model, texts))):
        raise InputError(f"{folder / 'validation'}: lacks the text of a domain", "the model routes by task")
    length = trained_length(str(folder)) or 256
    rows = evaluate_all(str(folder), model, tokenizer, texts, Windows(length, length // 2, 16))
    tokens = {data.name: np.array(tokenizer.encode(data.text).ids) for data in texts}
    use: ExpertUse | None = None
    if model.moe_layers():
        say("tracing which text goes to which expert")
        use = expert_use(trace(model, tokens, length))
    metrics = read_metrics(folder / METRICS)
    return Report(
        title=folder.name,
        facts=facts(model, read_json(folder / "run.json"), metrics),
        compression=[_compression(row) for row in rows],
        metrics=metrics,
        experts=use,
        samples=_samples(model, tokenizer, texts, args) if _can_write(model) else [],
    )


def facts(model: "Transformer", run: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    config = model.config
    moe, layers, size = config.moe, len(model.moe_layers()), model.size()
    experts = f"{layers} layers of {moe.n_routed} experts, {moe.top_k} a token, {moe.n_shared} shared"
    seconds = sum(row["tokens"] / row["step"] / row["tokens_per_s"] for row in metrics if row.get("tokens_per_s"))
    last = metrics[-1] if metrics else {"step": 0, "tokens": 0}
    return [
        ("parameters", f"{size.stored / 1e6:.1f} M stored"),
        ("active", f"{size.active / 1e6:.1f} M per token"),
        ("architecture", f"{config.attention.kind.upper()}, {experts}"),
        ("trained on", f"{last['tokens']:,} tokens in {last['step']:,} steps"),
        ("time in steps", f"{seconds / 60:.1f} minutes"),
        ("seed", str(run.get("seed", 0))),
    ]


def _compression(row: Row) -> Compression:
    bits = row.evaluation.bits_per_byte
    return Compression(domain=row.data.name, bits_per_byte=bits, gzip=row.compressors["gzip"], xz=row.compressors["xz"])


def _can_write(model: "Transformer") -> bool:
    """Whether a token's experts depend on earlier tokens alone; says so where they do not."""
    routing = model.config.moe.routing
    if not model.moe_layers() or routing.causal:
        return True
    say(f"no samples: {routing.kind} routing sees later tokens, so that this model cannot write")
    return False


def _samples(model: "Transformer", tokenizer: "Tokenizer", texts: list[Data], args: argparse.Namespace) -> list[Sample]:
    from moekit.checkpoint.load import stop_ids  # noqa: PLC0415
    from moekit.generation.sampling import SamplingConfig  # noqa: PLC0415
    from moekit.generation.text import Stop, complete  # noqa: PLC0415

    say("writing samples")
    prompts = [tokenizer.encode(data.text[:1000]).ids[:PROMPT_TOKENS] for data in texts]
    sampling = SamplingConfig(temperature=args.temperature, top_p=0.95)
    room = max(model.config.max_positions - PROMPT_TOKENS, 1)
    stop = Stop(ids=tuple(stop_ids(args.path)))
    tasks = [task for task in text_tasks(args.path, model, texts) if task is not None] or None
    done = complete(model, tokenizer, prompts, min(SAMPLE_TOKENS, room), sampling, args.seed, stop, task=tasks)
    return [
        Sample(domain=data.name, prompt=tokenizer.decode(prompt), continuation=row.text or "")
        for data, prompt, row in zip(texts, prompts, done.rows, strict=True)
    ]


def _as_text(sample: Sample) -> str:
    return f"=== {sample.domain}\n{sample.prompt}|{sample.continuation}"
