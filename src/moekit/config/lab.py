"""A lab: one training run in several variants, over several seeds, as a TOML file describes it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moekit.config.codec import update
from moekit.config.describe import describe
from moekit.config.errors import ConfigError, InputError, check
from moekit.config.presets.load import load_run, preset_names, read_toml
from moekit.config.run import RunConfig

KEYS = ("title", "base", "seeds", "settings", "variants")

EQUAL = ("train.batch", "train.steps", "model.vocab_size", "device")
"""What all variants must have in common besides `data`: otherwise they would not read the same text in one order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One configuration of a lab."""

    name: str
    config: RunConfig
    """for any seed"""
    sets: Mapping[str, str]
    """what its table says, by dotted key"""
    about: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lab:
    """Variants that read the same text in the same order, each with every seed."""

    title: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]


def read_lab(path: Path, further: Mapping[str, Any] | None = None) -> Lab:
    """The lab in a TOML file, every variant resolved and checked. Raises InputErrors that name file and key.

    `base` is a preset, or a run file beside the lab file; `settings` and then `further` change it for all variants,
    `variants.NAME` for one. The base's own seed gives way to `seeds`.
    """
    table = read_toml(path)
    try:
        return _lab(table, path, further or {})
    except ConfigError as error:
        raise InputError(f"{path}: {error}", error.hint) from None


def differences(lab: Lab) -> dict[str, dict[str, str]]:
    """For each variant, the dotted keys with their values in which not all variants agree."""
    values = {variant.name: {item.key: item.value for item in describe(variant.config)} for variant in lab.variants}
    keys = sorted({key for known in values.values() for key in known})
    unlike = [key for key in keys if len({known.get(key) for known in values.values()}) > 1]
    return {name: {key: known[key] for key in unlike if key in known} for name, known in values.items()}


def _lab(table: dict[str, Any], path: Path, further: Mapping[str, Any]) -> Lab:
    for key in table:
        check(key in KEYS, key, "unknown key", f"known: {', '.join(KEYS)}")
    title, base = table.get("title", path.stem), table.get("base")
    check(isinstance(title, str), "title", f"{title!r} is not text")
    check(isinstance(base, str) and base != "", "base", "name a preset, or a run file beside this one")
    named = base if base in preset_names() else str(path.parent / base)  # type: ignore[operator]
    common = update(_changed(load_run(named), table.get("settings", {}), "settings"), further)
    variants = table.get("variants", {})
    message = "there are none" if variants == {} else f"{variants!r} is not a section"
    check(isinstance(variants, dict) and variants != {}, "variants", message, "write a table [variants.NAME] for each")
    lab = Lab(
        title=title,
        seeds=_seeds(table.get("seeds", [0])),
        variants=tuple(_variant(name, entry, common) for name, entry in variants.items()),
    )
    _check_same_text(lab)
    return lab


def _seeds(value: Any) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    check(whole and value != [], "seeds", f"{value!r} is not a list of whole numbers", "write it as [0, 1, 2]")
    check(len(set(value)) == len(value), "seeds", f"{value!r} holds one twice")
    return tuple(value)


def _variant(name: str, table: Any, common: RunConfig) -> Variant:
    key = f"variants.{name}"
    # Its runs are kept in a folder of that name.
    fits = name == Path(name).name and name.isprintable() and len(name) <= 60 and name[:1] not in ("", ".")
    check(fits, key, f"{name!r} cannot be the name of a folder", "name variants such as `bias`")
    check(isinstance(table, dict), key, f"{table!r} is not a section")
    changes = {entry: value for entry, value in table.items() if entry != "about"}
    about = table.get("about", "")
    check(isinstance(about, str), f"{key}.about", f"{about!r} is not text")
    return Variant(name=name, config=_changed(common, changes, key), sets=dict(_flat(changes)), about=about)


def _changed(base: RunConfig, changes: Any, key: str) -> RunConfig:
    check(isinstance(changes, dict), key, f"{changes!r} is not a section")
    check("seed" not in changes, f"{key}.seed", "a variant has no seed of its own", "list them in `seeds`")
    try:
        return replace(update(base, changes), seed=0)
    except ConfigError as error:
        raise error.inside(key) from None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value).lower() if isinstance(value, bool) else str(value)


def _check_same_text(lab: Lab) -> None:
    first, *others = lab.variants
    expected = _reading(first.config)
    for variant in others:
        found = _reading(variant.config)
        for key in sorted(found.keys() | expected.keys()):
            message = f"{found.get(key)}, but {expected.get(key)} in variant {first.name}"
            hint = "all variants read the same text in the same order; set it for all under [settings]"
            check(found.get(key) == expected.get(key), f"variants.{variant.name}.{key}", message, hint)


def _reading(config: RunConfig) -> dict[str, str]:
    return {item.key: item.value for item in describe(config) if item.key.startswith("data.") or item.key in EQUAL}
