"""Read the documents of a source: text files, JSONL, Parquet, folders of them, or the demo corpus.

What cannot be used (bytes that are not text, empty files and documents) is skipped, counted and reported.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from moekit.config.errors import InputError
from moekit.config.run import Source
from moekit.data.demo import PREFIX, read_demo

BETWEEN = "\n\n\n\n"
"""Three blank lines separate the documents of a .txt file."""


@dataclass(frozen=True, slots=True)
class Skip:
    """What was left out for one reason."""

    reason: str
    count: int
    example: str
    """where the first one was"""


class Documents(NamedTuple):
    """The documents of a source, and what was left out."""

    texts: list[str]
    skips: tuple[Skip, ...]


class UnusableError(Exception):
    """A file or a document that holds no text; its message is the reason."""


def read_documents(source: Source, cache: Path | None = None) -> Documents:
    """The documents of `source.path`; what the demo corpus takes apart is kept in the folder `cache`."""
    return _read(source.path, source.column, cache)


def read_validation(source: Source, cache: Path | None = None) -> Documents:
    """The documents of `source.valid`."""
    return _read(source.valid, source.column, cache)


def _read(location: str, column: str, cache: Path | None) -> Documents:
    if location.startswith(PREFIX):
        return Documents(read_demo(location.removeprefix(PREFIX), cache), ())
    root = Path(location).expanduser()
    if not root.exists():
        raise InputError(f"{location}: no such file or folder", "relative paths start at the current folder")
    texts: list[str] = []
    skips: dict[str, Skip] = {}
    for path in _files(root):
        try:
            for place, text in _parts(path, column):
                _check_text(text, place, texts, skips)
        except UnusableError as reason:
            _count(skips, str(reason), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not texts:
        reasons = "; ".join(f"{skip.reason}: {skip.count}, such as {skip.example}" for skip in skips.values())
        raise InputError(f"{location}: holds no text ({reasons or 'no files'})", "name files with UTF-8 text")
    return Documents(texts, tuple(skips.values()))


def _files(root: Path) -> Iterator[Path]:
    """The file itself, or the files of a folder in sorted order without hidden ones."""
    if not root.is_dir():
        yield root
        return
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden:
            yield path


def _parts(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """The documents of one file, each with the place where it stands."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, column)
    elif suffix == ".jsonl":
        yield from _jsonl(path, column)
    else:
        text = _text(path)
        for part in text.split(BETWEEN) if suffix == ".txt" else [text]:
            yield str(path), part


def _text(path: Path) -> str:
    content = path.read_bytes()
    if not content.strip():
        raise UnusableError("empty file")
    if b"\0" in content:
        raise UnusableError("binary file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableError("not UTF-8") from None
    return text.replace("\r\n", "\n")


def _jsonl(path: Path, column: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(): it would also cut at the line separators that JSON strings may hold.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _field(line, column, place)


def _field(line: str, column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: is not JSON ({error})", "each line of a .jsonl file is one JSON object") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: is not a JSON object", f'write it as {{"{column}": "..."}}')
    if column not in row:
        raise _unknown_column(place, column, list(row))
    return _string(row[column], column, place)


def _parquet(path: Path, column: str) -> Iterator[tuple[str, str]]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415  # an optional package
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow", 'pip install "moekit[parquet]"') from None
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _unknown_column(str(path), column, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                for value in batch.column(0).to_pylist():
                    place = f"{path}, row {row}"
                    yield place, _string(value, column, place)
                    row += 1
    except ArrowException as error:
        raise InputError(f"{path}: is not a Parquet file ({error})") from None


def _string(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: column `{column}` holds {type(value).__name__}, not text")
    return value


def _unknown_column(place: str, column: str, known: list[str]) -> InputError:
    listed = ", ".join(known) or "none"
    return InputError(f"{place}: has no column `{column}`; its columns are {listed}", "set the source's column")


def _check_text(text: str, place: str, texts: list[str], skips: dict[str, Skip]) -> None:
    if not text.strip():
        _count(skips, "empty document", place)
        return
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        _count(skips, "not Unicode", place)
        return
    texts.append(text)


def _count(skips: dict[str, Skip], reason: str, place: str) -> None:
    first = skips.get(reason, Skip(reason, 0, place))
    skips[reason] = replace(first, count=first.count + 1)
