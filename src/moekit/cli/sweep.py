"""`moekit sweep`: train several variants of a run over several seeds on the same data, and compare them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.cli.main import near
from moekit.cli.run_folder import check_run_folder
from moekit.cli.train import Watcher, check_fit
from moekit.config.catalogue import help_lines
from moekit.config.codec import overrides
from moekit.config.errors import ConfigError, InputError
from moekit.config.lab import Lab, read_lab
from moekit.lab.places import Place, check_unchanged, places

if TYPE_CHECKING:
    from moekit.lab.carry_out import Done
    from moekit.report.sweep_values import VariantResult

SETTINGS = True
"""This verb takes settings for all variants, `--train.steps 50`."""

COLUMNS = {
    "loss": ("loss", 4),
    "max_violation": ("MaxVio batch", 2),
    "max_violation_global": ("MaxVio global", 2),
    "entropy": ("entropy", 3),
    "dead_experts": ("dead", 1),
    "drop_rate": ("dropped", 3),
    "experts_per_token": ("experts/token", 2),
    "tokens_per_s": ("tokens/s", 0),
}
"""Figure of a run: head of its column, and decimals."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("lab", nargs="?", metavar="LAB", help="TOML file: base, seeds, settings, variants")
    add("--out", metavar="DIR", help="folder of the runs, sweep.json and sweep.html (runs/LAB); goes on what is there")
    add("--only", nargs="+", metavar="NAME", help="train these variants alone")
    add("--json", action="store_true", help="print sweep.json in place of the table")


def help_settings(args: argparse.Namespace) -> str:  # noqa: ARG001
    """What a lab can compare."""
    intro = "settings of `moekit train` change all variants, for example --train.steps 50"
    return "\n".join([intro, *help_lines()])


def run(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Resolve all variants, train what is not finished, compare."""
    if args.out == "":
        raise InputError("--out is empty", "name a folder")
    if args.lab is None:
        raise InputError("name a lab", "a TOML file with base, seeds, settings and variants, such as labs/balance.toml")
    path = Path(args.lab)
    lab = read_lab(path, overrides(settings))
    for variant in lab.variants:
        try:
            check_fit(variant.config)
        except ConfigError as error:
            inside = error.inside(f"variants.{variant.name}")
            raise InputError(f"{path}: {inside}", error.hint) from None
    if not lab.variants[0].config.data.sources:
        raise InputError(f"{path}: `settings.data.sources`: there is nothing to learn from", "name a text there")
    folder = Path(args.out or f"runs/{path.stem}")
    found = places(lab, folder)
    for place in found:
        check_run_folder(place.folder, resume=True)
    check_unchanged(found)
    chosen = _chosen(lab, args.only)
    return _sweep(lab, found, [place for place in found if place.variant.name in chosen], folder, args)


def _chosen(lab: Lab, only: Sequence[str] | None) -> list[str]:
    names = [variant.name for variant in lab.variants]
    for name in only or ():
        if name not in names:
            hint = near(name, names) or f"variants: {', '.join(names)}"
            raise InputError(f"--only {name}: there is no such variant", hint)
    return list(only or names)


def _sweep(lab: Lab, every: list[Place], chosen: list[Place], folder: Path, args: argparse.Namespace) -> int:
    from moekit.cli.console import say  # noqa: PLC0415 - rich and torch only when there is work
    from moekit.cli.device import prepare_device  # noqa: PLC0415
    from moekit.data.cache import default_cache  # noqa: PLC0415
    from moekit.data.corpus import prepare  # noqa: PLC0415
    from moekit.lab.carry_out import LabRun, finished, mark  # noqa: PLC0415

    config = lab.variants[0].config
    prepare_device(config.device)
    corpus = prepare(config.data, config.model.vocab_size, default_cache(), say)
    data_mark = mark(corpus)
    left = [place for place in chosen if finished(place, data_mark) is None]
    say(f"{len(chosen)} runs of {config.train.steps} steps, {len(chosen) - len(left)} of them finished before")
    for number, place in enumerate(left, 1):
        run = LabRun(place, corpus, data_mark)
        say(f"run {number} of {len(left)}: {place.variant.name}, seed {place.seed}, from step {run.run.progress.step}")
        watcher = Watcher(place.config, run.run.progress.step)
        whole = watcher.watch(run)
        if not whole or (watcher.signalled and number < len(left)):
            at = f"at step {run.run.progress.step} of " if not whole else "after "
            only = f" --only {' '.join(args.only)}" if args.only else ""
            say(f"stopped {at}{place.folder}; go on with: moekit sweep {args.lab} --out {folder}{only}")
            return 0
    _show(lab, [done for place in every if (done := finished(place, data_mark)) is not None], folder, args)
    return 0


def _show(lab: Lab, runs: "list[Done]", folder: Path, args: argparse.Namespace) -> None:
    from moekit.checkpoint.storage import write_json  # noqa: PLC0415
    from moekit.cli.console import show_table  # noqa: PLC0415
    from moekit.lab.summary import summarise, to_json  # noqa: PLC0415
    from moekit.report.sweep_page import render_sweep  # noqa: PLC0415
    from moekit.report.sweep_values import SweepResult  # noqa: PLC0415

    results = summarise(lab, runs)
    data = to_json(lab, runs, results)
    write_json(folder / "sweep.json", data)
    page = render_sweep(SweepResult(title=lab.title, facts=_facts(lab, runs), variants=results))
    (folder / "sweep.html").write_text(page, "utf-8")
    if args.json:
        print(json.dumps(data, ensure_ascii=False))
        return
    columns = {key: head for key, head in COLUMNS.items() if any(key in result.figures for result in results)}
    heads = ["variant", *(head for head, _ in columns.values())]
    rows = [_cells(result, columns) for result in results]
    if any(result.difference is not None for result in results):
        heads.insert(2, f"minus {lab.variants[0].name}")
        for row, result in zip(rows, results, strict=True):
            row.insert(2, _difference(result))
    show_table(lab.title, heads, rows)
    if not all(result.causal for result in results):
        print("* looks at later tokens, so that its loss cannot be compared")
    print(f"page: {folder / 'sweep.html'}")


def _cells(result: "VariantResult", columns: dict[str, tuple[str, int]]) -> list[str]:
    cells = [result.name + ("" if result.causal else " *")]
    for key, (_, decimals) in columns.items():
        found = result.figures.get(key)
        text = "-" if found is None else f"{found.mean:,.{decimals}f}"
        if found is not None and found.spread is not None and key == "loss":
            text += f" ± {found.spread:.{decimals}f}"
        cells.append(text)
    return cells


def _difference(result: "VariantResult") -> str:
    gap = result.difference
    spread = "" if gap is None or gap.spread is None else f" ± {gap.spread:.4f}"
    return "" if gap is None else f"{gap.mean:+.4f}{spread}"


def _facts(lab: Lab, runs: "list[Done]") -> list[tuple[str, str]]:
    config = lab.variants[0].config
    tokens = config.train.steps * config.train.batch * config.data.sequence_length
    domains = ", ".join(source.domain for source in config.data.sources)
    return [
        ("variants", f"{len(lab.variants)}"),
        ("seeds", ", ".join(map(str, lab.seeds))),
        ("finished runs", f"{len(runs)} of {len(lab.variants) * len(lab.seeds)}"),
        ("each trained on", f"{tokens:,} tokens in {config.train.steps:,} steps"),
        ("text", domains),
    ]
