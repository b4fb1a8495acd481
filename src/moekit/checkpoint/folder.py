"""What a folder of weights holds, and what is wrong with it, from its index and headers alone; knows no torch."""

from pathlib import Path
from typing import Any, NamedTuple

from moekit.checkpoint.header import Stored, read_header
from moekit.config.errors import InputError
from moekit.config.files import read_json

WEIGHTS = "model.safetensors"

INDEX = f"{WEIGHTS}.index.json"

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Problem(NamedTuple):
    """Something wrong with a checkpoint, and of which kind."""

    kind: str
    text: str
    hint: str = ""


class Contents(NamedTuple):
    """The tensors of a folder by name, in the order of files and bytes; the files; and what is wrong with them."""

    tensors: dict[str, Stored]
    files: tuple[Path, ...]
    problems: tuple[Problem, ...]


def contents(folder: Path) -> Contents:
    """What the single file or the shards of `folder` hold. Raises InputError where there are no weights at all."""
    if (folder / WEIGHTS).is_file():
        return _merged([folder / WEIGHTS], None)
    if (folder / INDEX).is_file():
        shards, weight_map = _indexed(folder)
        return _merged(shards, weight_map)
    pickled = sorted(file for pattern in PICKLES for file in folder.glob(pattern))
    if pickled:
        hint = "where you trust its source, convert it to safetensors: transformers' save_pretrained does"
        raise InputError(f"{pickled[0]}: pickled weights can run code and are not opened", hint)
    raise InputError(f"{folder}: no {WEIGHTS} in it, and no {INDEX}", "give a folder with safetensors weights")


def _indexed(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shards in order, and which of them the index says each tensor is in."""
    file = folder / INDEX
    weight_map: Any = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file}: `weight_map` is missing, or names no tensor")
    try:
        example = {name: tensor for tensor, name in weight_map.items()}
    except TypeError:
        raise InputError(f"{file}: `weight_map` holds something that is no name of a file") from None
    for name, tensor in example.items():
        if not isinstance(name, str) or not name or Path(name).name != name or name in (".", ".."):
            raise InputError(f"{file}: {tensor} should be in {name!r}, which is no file of this folder")
        if "\0" in name or not name.endswith(".safetensors"):
            raise InputError(f"{file}: {tensor} should be in {name!r}, which is no safetensors file")
    shards = {name: folder / name for name in sorted(example)}
    return list(shards.values()), {tensor: shards[name] for tensor, name in weight_map.items()}


def _merged(files: list[Path], weight_map: dict[str, Path] | None) -> Contents:
    tensors: dict[str, Stored] = {}
    problems: list[Problem] = []
    for file in files:
        if not file.is_file():
            problems.append(Problem("missing shard", f"{file}: no such file, but the index names it"))
            continue
        try:
            found = read_header(file)
        except InputError as error:
            problems.append(Problem("damaged file", str(error), error.hint))
            continue
        for name in found.keys() & tensors.keys():
            problems.append(Problem("duplicated", f"{name} is in {tensors[name].file.name} and in {file}"))
        tensors |= found
    if weight_map is not None and not problems:
        problems += _misplaced(tensors, weight_map)
    return Contents(tensors, tuple(files), tuple(problems))


def _misplaced(tensors: dict[str, Stored], weight_map: dict[str, Path]) -> list[Problem]:
    """Where index and shards disagree."""
    problems = []
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            problems.append(Problem("missing", f"{file}: does not hold {name}, but the index says so"))
    for name in tensors.keys() - weight_map.keys():
        problems.append(Problem("not indexed", f"{tensors[name].file}: holds {name}, which the index does not name"))
    return problems
