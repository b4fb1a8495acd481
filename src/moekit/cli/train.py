"""`moekit train`: train a model from a preset or a TOML file."""

import argparse
import json
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moekit.cli.run_folder import RUN, check_run_folder, read_run
from moekit.config.catalogue import help_lines
from moekit.config.codec import overrides, to_toml, update
from moekit.config.describe import describe
from moekit.config.errors import ConfigError, InputError, check
from moekit.config.presets.load import load_run, preset_names
from moekit.config.routing import TaskRouting
from moekit.config.run import DataConfig, RunConfig, Source

SETTINGS = True
"""This verb takes settings of the configuration, `--optim.lr 0.1`."""

MAY_CHANGE = {"steps", "checkpoint_every", "keep", "validate_every", "tensorboard"}
"""Settings of `train` that a resumed run may have otherwise than before."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("name", nargs="?", metavar="PRESET|FILE", help=f"TOML file, or one of {', '.join(preset_names())}")
    add("--out", metavar="DIR", help="folder of the run, the model folder at the end (runs/NAME)")
    add("--resume", action="store_true", help="go on where the run in DIR stopped")
    add("--data", action="append", default=[], metavar="NAME=PATH", help="text to learn, by domain; repeatable")
    add("--seed", metavar="N", help="seed of the weights and of the order of the data")
    add("--device", help="where to compute")
    add("--show-config", action="store_true", help="print the resolved configuration as TOML and stop")
    add("--json", action="store_true", help="print the result as one JSON object")


def help_settings(args: argparse.Namespace) -> str:
    """The settings with their values in the preset or file named on the command line."""
    config = load_run(args.name) if args.name else RunConfig()
    lines = [f"  --{item.key.replace('_', '-')} {item.value}\n      {item.text}" for item in describe(config)]
    return "settings" + (f" of {args.name}" if args.name else "") + ":\n" + "\n".join([*lines, *help_lines()])


def run(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Resolve the configuration, prepare the data, train, say what came out."""
    if args.out == "":
        raise InputError("--out is empty", "name a folder")
    folder = Path(args.out or f"runs/{Path(args.name or 'run').stem}")
    config = resolve(args, settings, folder)
    if args.show_config:
        print(to_toml(config), end="")
        return 0
    check_run_folder(folder, args.resume)
    if not config.data.sources:
        raise InputError("`data.sources`: there is nothing to learn from", "--data NAME=PATH names a text")
    return _train(config, folder, args)


def resolve(args: argparse.Namespace, settings: list[tuple[str, str]], folder: Path) -> RunConfig:
    """Defaults, then the preset or file (or the run to resume), then the options."""
    stored = _stored(folder) if args.resume else None
    if args.name is not None:
        config = load_run(args.name)
    elif stored is not None:
        config = stored
    else:
        message = f"{folder} holds no {RUN} to resume from" if args.resume else "name a preset or a TOML file"
        raise InputError(message, f"name what to train: a TOML file, or one of {', '.join(preset_names())}")
    for key in ("seed", "device"):
        if getattr(args, key) is not None:
            settings = [*settings, (key, getattr(args, key))]
    if args.data:
        config = replace(config, data=replace(config.data, sources=tuple(map(parse_source, args.data))))
    config = update(config, overrides(settings))
    check_fit(config)
    if stored is not None:
        _check_same(config, stored, folder)
    return config


def parse_source(text: str) -> Source:
    """`NAME=PATH` or `PATH`, the name then being the file's."""
    name, equals, path = text.partition("=")
    if not (path if equals else text):
        raise InputError(f"--data {text}: names no file", "write --data NAME=PATH")
    return Source(path=path, domain=name) if equals else Source(path=text, domain=Path(text).stem)


def check_fit(config: RunConfig) -> None:
    """What no section of the configuration can see alone."""
    length, limit = config.data.sequence_length, config.model.max_positions
    message = f"{length} exceeds model.max_positions = {limit}"
    check(length <= limit, "data.sequence_length", message, "shorten the sequences, or raise model.max_positions")
    routing, n_sources = config.model.moe.routing, len(config.data.sources)
    if isinstance(routing, TaskRouting) and n_sources:
        message = f"{routing.n_tasks} tasks, but the data has {n_sources} domains, each of which is a task"
        check(routing.n_tasks == n_sources, "model.moe.routing.n_tasks", message, f"set it to {n_sources}")
    board = not config.train.tensorboard or find_spec("tensorboard") is not None
    check(board, "train.tensorboard", "the package tensorboard is not installed", 'pip install "moekit[tensorboard]"')
    for index, source in enumerate(config.data.sources):
        # The validation text of a domain is kept in a file of that name.
        fits = source.domain == Path(source.domain).name and source.domain.isprintable() and len(source.domain) <= 60
        key, message = f"data.sources.{index}.domain", f"{source.domain!r} cannot be the name of a file"
        check(fits and source.domain[:1] not in ("", "."), key, message, "name domains such as `code`")


def _stored(folder: Path) -> RunConfig | None:
    data = read_run(folder)
    if data is None:
        return None
    try:
        return update(RunConfig(data=DataConfig(sources=())), data)
    except ConfigError as error:
        raise InputError(f"{folder / RUN}: {error}", error.hint) from None


def _check_same(config: RunConfig, stored: RunConfig, folder: Path) -> None:
    """A resumed run must be the run it was, or its results would belong to neither."""
    free = {key: getattr(stored.train, key) for key in MAY_CHANGE}
    same = replace(config, train=replace(config.train, **free))
    now, before = ({item.key: item.value for item in describe(entry)} for entry in (same, stored))
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            message = f"`{key}`: {now.get(key)} here, but {before.get(key)} in {folder}"
            raise InputError(message, "a run is resumed with the settings it began with; or choose another --out")


def _train(config: RunConfig, folder: Path, args: argparse.Namespace) -> int:
    from moekit.cli.console import say  # noqa: PLC0415 - rich and torch only when there is work
    from moekit.cli.device import prepare_device  # noqa: PLC0415
    from moekit.data.cache import default_cache  # noqa: PLC0415
    from moekit.data.corpus import prepare  # noqa: PLC0415
    from moekit.train.loop import Run  # noqa: PLC0415

    prepare_device(config.device)
    corpus = prepare(config.data, config.model.vocab_size, default_cache(), say)
    for domain in corpus.domains:
        for skip in domain.skips:
            say(f"{domain.name}: skipped {skip.count} ({skip.reason}), for example {skip.example}")
    training = Run(config, corpus, folder, args.resume)
    _say_start(training, say)
    watcher = Watcher(config, training.progress.step)
    finished = watcher.watch(training)
    if not finished:
        say(f"stopped at step {training.progress.step}; go on with: moekit train --out {folder} --resume")
        return 0
    _show_result(training, args.json)
    return 0


class Watcher:
    """The progress bar, and SIGINT and SIGTERM turned into a stop after the step at hand."""

    def __init__(self, config: RunConfig, done: int) -> None:
        from moekit.cli.console import Steps  # noqa: PLC0415

        self.signalled = False
        self.steps = Steps(config.train.steps, done)
        self.recent: list[float] = []

    def watch(self, training: Any) -> bool:
        """Train until the end or a signal; a second signal interrupts at once."""
        before = {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return training.train(self)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.steps.close()

    def _signal(self, number: int, _: object) -> None:
        self.signalled = True
        signal.signal(number, signal.default_int_handler)

    def stepped(self, row: dict[str, Any]) -> None:
        """Show the step."""
        self.recent = [*self.recent[-19:], row["tokens_per_s"]]
        speed = len(self.recent) / sum(1 / value for value in self.recent)
        violation = max((layer["max_violation"] for layer in row["layers"]), default=0.0)
        self.steps.update(row["step"], f"loss {row['loss']:.3f}  {speed:,.0f} tokens/s  MaxVio {violation:.2f}")

    def stopping(self) -> bool:
        """Whether a signal came."""
        return self.signalled


def _say_start(training: Any, say: Any) -> None:
    config, model = training.config, training.stepper.model
    size = model.size()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    balance = ", ".join(rule.kind for rule in config.model.moe.balance) or "nothing"
    precision = f"{dtype}, FP8 simulated" if config.train.fp8 else dtype
    say(f"{size.stored:,} parameters, of which a token uses {size.active:,}; in {precision}; balanced by {balance}")
    tokens = sum(len(domain.train) for domain in training.corpus.domains)
    a_step, done = config.train.batch * config.data.sequence_length, training.progress.step
    say(f"{tokens:,} training tokens; {config.train.steps} steps of {a_step:,} tokens, from step {done}")


def _show_result(training: Any, as_json: bool) -> None:
    validation, folder = training.progress.validation, training.folder
    mean = sum(figures["bits_per_byte"] for figures in validation.values()) / max(len(validation), 1)
    if as_json:
        result = {
            "folder": str(folder),
            "step": training.progress.step,
            "validation": validation,
            "bits_per_byte": mean,
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    for domain, figures in validation.items():
        print(f"{domain}: {figures['bits_per_byte']:.3f} bits per byte")
    print(f"mean: {mean:.3f} bits per byte after {training.progress.step} steps")
    print(f"model: {folder}")
    sys.stdout.flush()
