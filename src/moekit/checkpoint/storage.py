"""Files and folders that appear whole or not at all; knows no torch."""

import json
import os
import shutil
from pathlib import Path

from moekit.config.errors import InputError


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON under a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
    flush(temporary)
    temporary.replace(path)


def flush(path: Path) -> None:
    """Wait until the file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class new_folder:  # noqa: N801
    """A folder that appears whole or not at all: `with new_folder(path) as building: ...`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.building = path.with_name(f".{path.name}.writing")

    def __enter__(self) -> Path:
        if os.path.lexists(self.path):
            raise InputError(f"{self.path} exists already", "choose another folder")
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir(parents=True)
        return self.building

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.building, ignore_errors=True)
            return
        for entry in self.building.iterdir():
            flush(entry)
        flush(self.building)
        self.building.rename(self.path)
        flush(self.path.parent)
