"""`moekit train`: train a model from a preset or a TOML file."""

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.config.codec import overrides, to_toml, update
from moekit.config.describe import describe
from moekit.config.errors import InputError
from moekit.config.presets.load import load_run, preset_names
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


def help_settings(arguments: list[str]) -> str:
    """The settings with their values in the preset or file named on the command line."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    config = load_run(names[0]) if names else RunConfig()
    lines = [f"  --{item.key.replace('_', '-')} {item.value}\n      {item.text}" for item in describe(config)]
    return "settings" + (f" of {names[0]}" if names else "") + ":\n" + "\n".join(lines)


def run(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Resolve the configuration, prepare the data, train, say what came out."""
    folder = Path(args.out or f"runs/{Path(args.name or 'run').stem}")
    config = resolve(args, settings, folder)
    if args.show_config:
        print(to_toml(config), end="")
        return 0
    if (folder / "run.json").exists() and not args.resume:
        raise InputError(f"{folder} holds a run already", "--resume goes on with it; --out names another folder")
    if not config.data.sources:
        raise InputError("`data.sources`: there is nothing to learn from", "--data NAME=PATH names a text")
    return _train(config, folder, args)


def resolve(args: argparse.Namespace, settings: list[tuple[str, str]], folder: Path) -> RunConfig:
    """Defaults, then the preset or file (or the run to resume), then the options."""
    stored = _stored(folder) if args.resume else None
    if args.name:
        config = load_run(args.name)
    elif stored is not None:
        config = stored
    else:
        raise InputError("name a preset or a TOML file", f"presets: {', '.join(preset_names())}")
    for key in ("seed", "device"):
        if getattr(args, key) is not None:
            settings = [*settings, (key, getattr(args, key))]
    if args.data:
        config = replace(config, data=replace(config.data, sources=tuple(map(parse_source, args.data))))
    config = update(config, overrides(settings))
    if stored is not None:
        _check_same(config, stored, folder)
    return config


def parse_source(text: str) -> Source:
    """`NAME=PATH` or `PATH`, the name then being the file's."""
    name, equals, path = text.partition("=")
    return Source(path=path, domain=name) if equals else Source(path=text, domain=Path(text).stem)


def _stored(folder: Path) -> RunConfig | None:
    file = folder / "run.json"
    if not file.exists():
        return None
    try:
        data = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    empty = RunConfig(data=DataConfig(sources=()))
    return update(empty, data)


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
    from moekit.data.cache import default_cache  # noqa: PLC0415
    from moekit.data.corpus import prepare  # noqa: PLC0415
    from moekit.train.loop import Run  # noqa: PLC0415

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
    stored = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    moe = config.model.moe
    idle = len(model.moe_layers()) * (moe.n_routed - moe.top_k) * 3 * moe.expert_width * config.model.width
    balance = ", ".join(rule.kind for rule in moe.balance) or "nothing"
    say(f"{stored:,} parameters, of which a token uses {stored - idle:,}; balanced by {balance}; computing in {dtype}")
    tokens = sum(len(domain.train) for domain in training.corpus.domains)
    a_step = config.train.batch * config.data.sequence_length
    say(f"{tokens:,} training tokens; {config.train.steps} steps of {a_step:,} tokens, from step {training.progress.step}")


def _show_result(training: Any, as_json: bool) -> None:
    validation, folder = training.progress.validation, training.folder
    mean = sum(figures["bits_per_byte"] for figures in validation.values()) / max(len(validation), 1)
    if as_json:
        result = {"folder": str(folder), "step": training.progress.step, "validation": validation, "bits_per_byte": mean}
        print(json.dumps(result, ensure_ascii=False))
        return
    for domain, figures in validation.items():
        print(f"{domain}: {figures['bits_per_byte']:.3f} bits per byte")
    print(f"mean: {mean:.3f} bits per byte after {training.progress.step} steps")
    print(f"model: {folder}")
    sys.stdout.flush()


