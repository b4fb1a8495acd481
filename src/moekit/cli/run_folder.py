"""The folder named by `--out`: whether a run may begin or go on there."""

import errno
import os
from pathlib import Path
from typing import Any

from moekit.config.errors import InputError
from moekit.config.files import read_json

RUN = "run.json"

CHECKPOINTS = "checkpoints"

WRITTEN = (
    RUN,
    CHECKPOINTS,
    "validation",
    "metrics.jsonl",
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What a run writes into its folder, or would make unreadable there; other files may lie beside it."""


def check_run_folder(folder: Path, resume: bool) -> None:
    """Raise an InputError where training into `folder` would destroy something, an OSError where it cannot write."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise InputError(f"--out {folder}: {existing} is not a folder", "choose another --out")
    found = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if RUN in found and not resume:
        raise InputError(f"{folder} holds a run already", "--resume goes on with it; --out names another folder")
    if found and RUN not in found and not (resume and _just_begun(folder)):
        raise InputError(f"{folder} holds {found[0]}, which no run of moekit wrote", "choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `run.json` says; None where a run has not yet written it."""
    file = folder / RUN
    return read_json(file) if os.path.lexists(file) else None


def _just_begun(folder: Path) -> bool:
    """Whether a run was killed here after making its folders and before writing `run.json`."""
    checkpoints = folder / CHECKPOINTS
    return checkpoints.is_dir() and not any(checkpoints.glob("step-*"))
