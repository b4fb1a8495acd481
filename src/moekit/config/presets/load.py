"""Find a preset or a TOML file by the name given on the command line."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from moekit.config.codec import update
from moekit.config.errors import ConfigError, InputError
from moekit.config.run import RunConfig


def preset_names() -> list[str]:
    """The names `load_run` knows."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def load_run(name: str) -> RunConfig:
    """The run that a preset or a TOML file describes. A file may start from a preset: `preset = "tiny"`."""
    if name in preset_names():
        return update(RunConfig(), tomllib.loads((_folder() / f"{name}.toml").read_text("utf-8")))
    path = Path(name)
    if not path.is_file():
        raise InputError(f"no preset and no file is called {name}", f"presets: {', '.join(preset_names())}")
    table = read_toml(path)
    base = RunConfig()
    if "preset" in table:
        chosen = str(table.pop("preset"))
        if chosen not in preset_names():
            raise InputError(f"{name}: no preset is called {chosen}", f"presets: {', '.join(preset_names())}")
        base = load_run(chosen)
    try:
        return update(base, table)
    except ConfigError as error:
        raise InputError(f"{name}: {error}", error.hint) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _folder() -> Any:
    return resources.files("moekit.config.presets")
