"""The runs of a lab and where each is kept; knows no torch."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moekit.config.codec import update
from moekit.config.describe import describe
from moekit.config.errors import ConfigError, InputError
from moekit.config.files import read_json
from moekit.config.lab import Lab, Variant
from moekit.config.run import DataConfig, RunConfig


class Place(NamedTuple):
    """One variant with one seed, and the folder of its run."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def config(self) -> RunConfig:
        """The run."""
        return replace(self.variant.config, seed=self.seed)


def places(lab: Lab, folder: Path) -> list[Place]:
    """Every run of the lab in the order in which they are done: all variants with the first seed, then the next."""
    return [
        Place(variant, seed, folder / "runs" / variant.name / f"seed-{seed}")
        for seed in lab.seeds
        for variant in lab.variants
    ]


def check_unchanged(found: Iterable[Place]) -> None:
    """Raise an InputError where a folder holds a run of another configuration."""
    for place in found:
        file = place.folder / "run.json"
        if not file.exists():
            continue
        try:
            stored = update(RunConfig(data=DataConfig(sources=())), read_json(file))
        except ConfigError as error:
            raise InputError(f"{file}: {error}", error.hint) from None
        now, before = ({item.key: item.value for item in describe(config)} for config in (place.config, stored))
        for key in sorted(now.keys() | before.keys()):
            if now.get(key) != before.get(key):
                message = f"{place.folder}: `{key}` was {before.get(key)} in that run, and is {now.get(key)} in the lab"
                raise InputError(message, "remove that folder, or choose another --out")
