"""Files that can be made again: named by what they are made from, and never half written."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from moekit.config.errors import InputError

FORMAT = "1"
"""Changes whenever a cached file would be made differently from the same input."""


def default_cache() -> Path:
    """$MOEKIT_CACHE, or else the folder of this user's caches."""
    if own := os.environ.get("MOEKIT_CACHE"):
        return Path(own).expanduser()
    if common := os.environ.get("XDG_CACHE_HOME"):
        return Path(common).expanduser() / "moekit"
    return Path.home() / ".cache" / "moekit"


def cache_key(parts: Iterable[str]) -> str:
    """A name for what is made from these texts."""
    digest = hashlib.sha256(FORMAT.encode())
    for part in parts:
        content = part.encode()
        # The length keeps ["ab", "c"] apart from ["a", "bc"].
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it appears whole or not at all, also when others write it at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: the cache cannot be written ({error.strerror or error})",
            "set MOEKIT_CACHE to a folder with room that is yours",
        ) from None
