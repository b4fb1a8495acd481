"""`moekit plan`: what a model stores and computes, whether it fits a machine, how fast it can be there; no torch."""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moekit.cli.plan_measure import verification, wanted
from moekit.cli.plan_request import in_options, request_from
from moekit.config.errors import ConfigError, InputError
from moekit.plan.blueprint import Blueprint
from moekit.plan.figure import Section, as_json
from moekit.plan.sources import blueprint_from
from moekit.plan.study import Request, study
from moekit.plan.words import power_of_ten

WRITABLE_BITS = 14000
"""Whole numbers of so many bits have less than 4300 digits."""


class Studied(NamedTuple):
    """A model, the name under which it was asked for, and the answers."""

    source: str
    blueprint: Blueprint
    sections: tuple[Section, ...]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("source", nargs="?", metavar="SOURCE", help="preset, config.json, folder, safetensors index or GGUF file")
    add("--list", action="store_true", help="list the presets, the papers' models and the devices")
    add(
        "--dtype",
        metavar="FORMAT",
        help="of the weights, also by part: bfloat16,routed=int4 (as the source stores them)",
    )
    add("--kv-dtype", default="bfloat16", metavar="FORMAT", help="of the key-value cache (%(default)s)")
    add("--context", type=int, metavar="N", help="tokens of a sequence (4096, or the model's if less)")
    add("--batch", type=int, default=1, metavar="N", help="sequences at once (%(default)s)")
    add("--prompt", type=int, metavar="N", help="tokens read before the first is generated (512)")
    add("--tokens", metavar="N", help="a training budget such as 14.8T, for its FLOPs")
    _add_machine(parser.add_argument_group("a machine: does it fit, how fast is it"))
    _add_training(parser.add_argument_group("training and many devices"))
    output = parser.add_argument_group("output")
    output.add_argument("--compare", nargs="+", default=[], metavar="SOURCE", help="other models beside it")
    output.add_argument("--sweep", metavar="KEY=V,V", help="variants of it: n_routed=16,32,64, or granularity=1,2,4")
    output.add_argument("--explain", action="store_true", help="each figure with its formula and the numbers in it")
    output.add_argument("--html", metavar="FILE", help="write one page with tables, bars and formulas")
    output.add_argument("--json", action="store_true", help="print one JSON object")


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add("--device", metavar="NAME", help="such as rtx-4090, h100-sxm; --list has all")
    add("--devices", type=int, metavar="N", help="how many of it (1)")
    add("--measure", action="store_true", help="this machine, measured: the same as --device this-machine")
    add("--verify", action="store_true", help="measure, then generate and train with a model that fits, and compare")
    add("--device-file", metavar="TOML", help="more devices, or other values of known ones")
    add("--ram", metavar="SIZE", help="memory of the computer around one device (64GB)")
    add("--ram-bandwidth", type=float, metavar="GB/S", help="of that memory (80)")
    add("--disk-bandwidth", type=float, metavar="GB/S", help="of reading its disk (7)")
    add("--hit-rate", type=float, metavar="F", help="share of wanted experts found in memory (as by chance)")


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--train", action="store_true", help="memory of a training step too")
    add("--optimizer", choices=("adamw", "muon"), help="whose moments are kept (muon)")
    add("--tokens-per-step", metavar="N", help="tokens of one step over all devices (batch x context x data)")
    for name in ("data", "expert", "tensor", "pipeline"):
        add(f"--{name}", type=int, default=1, metavar="N", help=f"degree of {name} parallelism (%(default)s)")
    add(
        "--zero", type=int, default=0, choices=range(4), help="what ZeRO spreads over copies of the model (%(default)s)"
    )
    add("--redundant", type=int, metavar="N", help="experts held twice under expert parallelism (0)")


def run(args: argparse.Namespace) -> int:
    """Study the models; write the page; print."""
    if args.list:
        from moekit.cli.plan_list import show_list  # noqa: PLC0415 - only when asked for

        return show_list(args.device_file, args.json)
    if args.source is None:
        raise InputError("name a model", "a preset, a config.json, a folder or a GGUF file; --list shows the presets")
    if args.compare and args.sweep:
        raise InputError("--compare and --sweep: give one of them")
    if args.explain and (args.compare or args.sweep):
        raise InputError("--explain: explains one model", "leave out --compare and --sweep")
    wanted(args)
    request = request_from(args)
    try:
        studied = [Studied(name, model, study(model, request)) for name, model in models(args)]
        if args.verify:
            tried = verification(args.source, studied[0].blueprint, request, args.dtype)
            studied[0] = studied[0]._replace(sections=(*studied[0].sections, tried))
    except ConfigError as error:
        raise in_options(error) from None
    except OverflowError:
        raise InputError(f"{args.source}: its numbers are too large to compute with") from None
    if args.html is not None:
        write_page(Path(args.html), title(args), studied, request)
    if args.json:
        print(json.dumps(to_json(args, studied, request), ensure_ascii=False, allow_nan=False))
    else:
        show(studied, request, args.explain)
    return 0


def models(args: argparse.Namespace) -> Iterable[tuple[str, Blueprint]]:
    """Name and shape of each model asked for."""
    if args.sweep is None:
        return [(source, blueprint_from(source)) for source in (args.source, *args.compare)]
    from moekit.plan.from_config import blueprint_of  # noqa: PLC0415 - what only a sweep needs
    from moekit.plan.sweep import config_from, sweep  # noqa: PLC0415

    config, base, key = config_from(args.source), blueprint_from(args.source), args.sweep.partition("=")[0].strip()
    return [
        (f"{key}={value}", blueprint_of(variant, f"{base.name}, {key}={value}", base.family, base.quantisation))
        for value, variant in sweep(config, args.sweep)
    ]


def to_json(args: argparse.Namespace, studied: Sequence[Studied], request: Request) -> dict[str, Any]:
    """What scripts read; these names stay."""
    found = [_model_json(each, request) for each in studied]
    if args.sweep is not None:
        return {"source": args.source, "sweep": args.sweep, "models": found}
    return {"source": args.source, "models": found} if args.compare else found[0]


def _model_json(each: Studied, request: Request) -> dict[str, Any]:
    model = each.blueprint
    asked = {
        "dtype": request.precision_of(model).name,
        "kv_dtype": request.kv.name,
        "context": request.context_of(model),
        "batch": request.batch,
    }
    return {
        "source": each.source,
        "name": model.name,
        "family": model.family,
        "asked": asked,
        **as_json(map(_writable, each.sections)),
    }


def _writable(section: Section) -> Section:
    """Whole numbers that Python refuses to write out, of more than 4300 digits, become text such as 1.234e5678."""
    figures = (
        figure._replace(value=power_of_ten(figure.value))
        if isinstance(figure.value, int) and figure.value.bit_length() > WRITABLE_BITS
        else figure
        for figure in section.figures
    )
    return section._replace(figures=tuple(figures))


def show(studied: Sequence[Studied], request: Request, explain: bool) -> None:
    """The answers for a reader."""
    from moekit.cli.plan_text import explain_section, show_comparison, show_section  # noqa: PLC0415 - rich comes late
    from moekit.plan.headlines import side_by_side  # noqa: PLC0415

    for each in studied:
        print("; ".join(f"{label} {text}" for label, text in facts(each.blueprint, request)))
    print()
    if len(studied) > 1:
        show_comparison(side_by_side([(each.source, each.sections) for each in studied]))
        return
    for section in studied[0].sections:
        explain_section(section) if explain else show_section(section)
    if not explain:
        print("--explain shows every figure with its formula, --json all values")


def facts(model: Blueprint, request: Request) -> list[tuple[str, str]]:
    """What was planned: label and text."""
    context = request.context_of(model)
    beyond = f" (the model is meant for {model.max_positions:,})" if context > model.max_positions else ""
    return [
        ("model", f"{model.name} ({model.family})" if model.family != model.name else model.name),
        ("layers", f"{model.layers} of width {model.width:,}"),
        ("weights", request.precision_of(model).name),
        ("cache", request.kv.name),
        ("context", f"{context:,} tokens{beyond}"),
        ("batch", f"{request.batch:,}"),
    ]


def title(args: argparse.Namespace) -> str:
    """What the page is about."""
    if args.sweep is not None:
        return f"{args.source}: {args.sweep}"
    return " \N{MIDDLE DOT} ".join([args.source, *args.compare])


def write_page(path: Path, heading: str, studied: Sequence[Studied], request: Request) -> None:
    """The page, in one step: a reader of the file sees the old one or the new one."""
    from moekit.report.plan_page import PlannedModel, render_plan  # noqa: PLC0415 - what only the page needs

    if path.is_dir():
        raise InputError(f"--html {path}: is a folder", "name a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"--html {path}: {above} is no folder", "name a file in a folder")
    pages = [PlannedModel(each.source, facts(each.blueprint, request), each.sections) for each in studied]
    text = render_plan(heading, pages)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
