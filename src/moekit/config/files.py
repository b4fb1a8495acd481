"""Read the object in a JSON file, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from moekit.config.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds no JSON object")
    return data
