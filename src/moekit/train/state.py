"""What a run needs to go on where it stopped, written so that a crash at any moment leaves a whole checkpoint."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from moekit.checkpoint.folder import WEIGHTS
from moekit.checkpoint.save import write_description, write_weights
from moekit.checkpoint.storage import flush, new_folder, write_json
from moekit.config.errors import InputError
from moekit.config.files import read_json
from moekit.config.model import ModelConfig
from moekit.data.corpus import Corpus
from moekit.tensors import Tensor

STATE = "training_state"
"""The part of a checkpoint that only training reads: `training_state.safetensors` and `.json`."""

VALIDATION = "validation"
"""Folder of the held-out texts in a run's folder."""


class UnsavedError(RuntimeError):
    """A checkpoint could not be written: the disk is full, say."""


class Checkpoints:
    """The checkpoints of a run: `DIR/checkpoints/step-00000200`, each a model folder with the training state in it.

    The newest `keep` and the best are kept. After each, `DIR` itself holds the same weights under the usual names.
    """

    def __init__(self, folder: Path, config: ModelConfig, tokenizer: Tokenizer, keep: int) -> None:
        self.folder, self.config, self.tokenizer, self.keep = folder, config, tokenizer, keep

    def save(self, step: int, model: dict[str, Tensor], tensors: dict[str, Tensor], values: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, publish its weights in the run's folder, and drop those not kept.

        `model` holds the model's tensors, `tensors` and `values` what else training needs.
        """
        path = checkpoint_folder(self.folder, step)
        try:
            if not path.exists():
                self._write(path, model, tensors, values)
            publish(path / WEIGHTS, self.folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            kept = saved_steps(self.folder)
            last = f"the last one, of step {kept[-1]}, is whole" if kept else "there is none before it"
            raise UnsavedError(f"{path}: the checkpoint cannot be written ({error}); {last}") from error
        self._drop(values["best_step"])
        return path

    def _write(self, path: Path, model: dict[str, Tensor], tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        with new_folder(path) as building:
            write_weights(model, self.config, building / WEIGHTS)
            state = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(state, building / f"{STATE}.safetensors")
            (building / f"{STATE}.json").write_text(json.dumps(values), "utf-8")
            write_description(self.config, building, self.tokenizer)

    def _drop(self, best: int) -> None:
        steps = saved_steps(self.folder)
        for step in set(steps) - set(steps[-self.keep :]) - {best}:
            shutil.rmtree(checkpoint_folder(self.folder, step), ignore_errors=True)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return folder / "checkpoints" / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps with a whole checkpoint, in order."""
    names = [entry.name.removeprefix("step-") for entry in (folder / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values that `Checkpoints.save` was given."""
    values = read_json(path / f"{STATE}.json")
    missing = {"step", "best_step", "best", "validation", "data"} - values.keys()
    if missing:
        raise InputError(f"{path / STATE}.json: lacks {', '.join(sorted(missing))}")
    try:
        return load_file(path / f"{STATE}.safetensors"), values
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path / STATE}.safetensors: cannot be read: {error}") from None


def publish(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where links are not possible, in one step."""
    temporary = target.with_name(f".{target.name}.writing")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        flush(temporary)
    temporary.replace(target)


def start_folder(folder: Path, run: dict[str, Any], config: ModelConfig, corpus: Corpus) -> None:
    """Make the run's folder, with what does not change while it runs.

    That is `run.json`, `config.json`, the tokenizer, and the held-out text of each domain in `validation/`.
    """
    for part in ("checkpoints", VALIDATION):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for domain in corpus.domains:
        (folder / VALIDATION / f"{domain.name}.txt").write_bytes(domain.valid_text.encode())
    write_description(config, folder, corpus.tokenizer)
    write_json(folder / "run.json", run)


def optimizer_tensors(parts: Sequence[torch.optim.Optimizer], names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizers' state as named tensors; `names` maps the id of a parameter to its name."""
    return {
        f"optimizer.{names[id(parameter)]}.{key}": value
        for part in parts
        for parameter, entries in part.state.items()
        for key, value in entries.items()
    }


def restore_optimizers(
    parts: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out."""
    owner = {id(p): part for part in parts for group in part.param_groups for p in group["params"]}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
            target = parameters[parameter]
            owner[id(target)].state.setdefault(target, {})[key] = value.clone()
