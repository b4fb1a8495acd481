"""The options of `moekit plan` as what they ask for."""

import argparse
from pathlib import Path

from moekit.cli.plan_measure import HERE, measured
from moekit.cli.plan_values import count, rate, size
from moekit.config.errors import ConfigError, InputError
from moekit.plan.devices import Device, device_named
from moekit.plan.layout import Layout
from moekit.plan.precision import parse_format, parse_precision
from moekit.plan.study import Host, Recipe, Request

HOST = ("ram", "ram_bandwidth", "disk_bandwidth", "hit_rate")

NEEDS = (
    ("device", ("devices", "device_file", "prompt", "redundant", *HOST)),
    ("train", ("optimizer", "tokens_per_step")),
)
"""Options without effect unless another one is there: better an error than a silence."""


def request_from(args: argparse.Namespace) -> Request:
    """All that was asked. Errors name the option."""
    _check_effects(args)
    given = {"prompt": args.prompt, "n_devices": args.devices, "redundant": args.redundant}
    try:
        return Request(
            precision=None if args.dtype is None else parse_precision(args.dtype),
            kv=parse_format(args.kv_dtype, "kv_dtype"),
            context=args.context,
            batch=args.batch,
            tokens=None if args.tokens is None else count("--tokens", args.tokens),
            layout=Layout(args.data, args.expert, args.tensor, args.pipeline, args.zero),
            recipe=_recipe(args),
            device=_device(args),
            host=_host(args),
            **{key: value for key, value in given.items() if value is not None},
        )
    except ConfigError as error:
        raise in_options(error) from None


def _check_effects(args: argparse.Namespace) -> None:
    given = {name for name in vars(args) if getattr(args, name) is not None}
    for needed, options in NEEDS:
        for option in options:
            if option in given and not getattr(args, needed):
                raise InputError(f"{_flag(option)}: has no effect without {_flag(needed)}")
    for option in HOST:
        if option in given and (args.devices or 1) > 1:
            raise InputError(f"{_flag(option)}: has no effect with several devices", "offloading is of one device")
    if args.redundant is not None and args.expert == 1:
        raise InputError("--redundant: has no effect without --expert", "for example --expert 32 --redundant 32")


def in_options(error: ConfigError) -> InputError:
    """The error, with the option in place of the key."""
    return InputError(f"{_flag(error.key)}: {error.reason}", error.hint)


def _recipe(args: argparse.Namespace) -> Recipe | None:
    if not args.train:
        return None
    tokens = None if args.tokens_per_step is None else count("--tokens-per-step", args.tokens_per_step)
    return Recipe(args.optimizer or "muon", tokens)


def _device(args: argparse.Namespace) -> Device | None:
    if args.device is None:
        return None
    if args.device == HERE:
        return measured(args.dtype)
    return device_named(args.device, None if args.device_file is None else Path(args.device_file))


def _host(args: argparse.Namespace) -> Host:
    given = {
        "ram": None if args.ram is None else size("--ram", args.ram),
        "ram_bandwidth": None if args.ram_bandwidth is None else rate("--ram-bandwidth", args.ram_bandwidth),
        "disk_bandwidth": None if args.disk_bandwidth is None else rate("--disk-bandwidth", args.disk_bandwidth),
        "hit_rate": args.hit_rate,
    }
    return Host(**{key: value for key, value in given.items() if value is not None})


def _flag(key: str) -> str:
    """The option for a key of a request."""
    return "--" + {"n_devices": "devices"}.get(key, key).replace("_", "-")
