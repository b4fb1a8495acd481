"""Carry out one run of a lab: train it, or the rest of it, measure it, and keep the figures beside it."""

import hashlib
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from moekit.checkpoint.storage import write_json
from moekit.config.errors import InputError
from moekit.config.files import read_json
from moekit.data.corpus import Corpus
from moekit.lab.figures import RunFigures, measure
from moekit.lab.places import Place
from moekit.train.loop import Run, Watcher
from moekit.train.step import DivergedError

RESULT = "result.json"
"""In a run's folder: its figures. A run is finished when this file is there."""


class LabRun:
    """A run of a lab, from where it stopped before. `data_mark` says which text it reads."""

    def __init__(self, place: Place, corpus: Corpus, data_mark: str) -> None:
        self.place, self.data_mark = place, data_mark
        self.run = Run(place.config, corpus, place.folder, resume=True)

    def train(self, watcher: Watcher) -> bool:
        """Train to the last step, measure and write the figures; False if the watcher stopped the run before."""
        try:
            if not self.run.train(watcher):
                return False
        except DivergedError as error:
            raise DivergedError(f"variant {self.place.variant.name}, seed {self.place.seed}: {error}") from None
        figures = asdict(measure(self.run))
        write_json(self.place.folder / RESULT, {"data": self.data_mark, "figures": figures})
        return True


class Done(NamedTuple):
    """A finished run."""

    place: Place
    figures: RunFigures


def finished(place: Place, data_mark: str) -> Done | None:
    """The run with its figures; None where it has not come to its end. Raises an InputError if it read other text."""
    file = place.folder / RESULT
    if not file.exists():
        return None
    stored = read_json(file)
    if stored.get("data") != data_mark:
        message = f"{place.folder}: that run read other text than there is now"
        raise InputError(message, "remove that folder, or choose another --out")
    return Done(place, _figures(stored.get("figures"), str(file)))


def mark(corpus: Corpus) -> str:
    """A digest of the text that is learned and of that which is held out, in tokens."""
    digest = hashlib.sha256()
    for domain in corpus.domains:
        digest.update(f"{domain.name} {domain.weight} {domain.train.size} {domain.valid.size}\n".encode())
        digest.update(domain.train.data)
        digest.update(domain.valid.data)
    return digest.hexdigest()[:32]


def _figures(data: Any, file: str) -> RunFigures:
    known = {field.name for field in fields(RunFigures)}
    if not isinstance(data, dict) or data.keys() != known:
        raise InputError(f"{file}: does not hold the figures of a run", "remove it; the run is then measured again")
    return RunFigures(**data)
