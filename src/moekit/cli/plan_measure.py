"""The parts of `moekit plan` that run something: measure this machine, and try the predictions on it."""

import argparse

from moekit.config.errors import ConfigError, InputError
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import Device
from moekit.plan.figure import Section
from moekit.plan.precision import parse_precision
from moekit.plan.study import Request

HERE = "this-machine"
"""The device that is measured, not looked up."""


def wanted(args: argparse.Namespace) -> None:
    """Turn --measure and --verify into the device they mean."""
    if args.verify:
        _check_runs(args)
    if args.measure or args.verify:
        if args.device not in (None, HERE):
            raise InputError(f"--device {args.device}: --measure and --verify are about this machine", "leave one out")
        args.device = HERE


def measured(dtype: str | None) -> Device:
    """This machine, measured for computing in the type that weights of `dtype` are computed in."""
    from moekit.cli.console import say  # noqa: PLC0415 - rich and torch come late
    from moekit.measure.machine import this_machine  # noqa: PLC0415

    say("measuring this machine")
    return this_machine(_computed_in(dtype))


def verification(source: str, model: Blueprint, request: Request, dtype: str | None) -> Section:
    """Predictions beside what this machine does."""
    from moekit.cli.console import say  # noqa: PLC0415 - rich and torch come late
    from moekit.measure.verify import Size, verify  # noqa: PLC0415
    from moekit.plan.sweep import config_from  # noqa: PLC0415

    assert request.device is not None
    size = Size(request.batch, request.prompt)
    return verify(config_from(source), model.name, request.device, _computed_in(dtype), size, say)


def _check_runs(args: argparse.Namespace) -> None:
    """Raise an InputError, before anything is measured, where the model or its type cannot be run."""
    from moekit.plan.sweep import config_from  # noqa: PLC0415 - what only this needs

    if args.compare or args.sweep:
        raise InputError("--verify: tries one model", "leave out --compare and --sweep")
    if args.dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"--dtype {args.dtype}: --verify runs float32 and bfloat16", "leave out --dtype, or --verify")
    try:
        config_from(args.source)
    except ConfigError:
        hint = "give a preset of a model, or a folder with config.json"
        raise InputError(f"--verify: {args.source} is nothing that moekit runs", hint) from None


def _computed_in(dtype: str | None) -> str:
    compute = "bfloat16" if dtype is None else parse_precision(dtype).default.compute
    return "float32" if compute == "float32" else "bfloat16"
