"""The source of moekit and its tests, as files and as syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "moekit"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def sources_and_tests() -> list[Path]:
    return sources() + sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8")))
