"""Small files, small functions, whole words, no hidden state."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from source_files import PACKAGE, ROOT, SOURCES, TESTS, name, nodes

VAGUE = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py", "manager.py"}
every_source = pytest.mark.parametrize("path", SOURCES, ids=name)
every_file = pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)


@every_file
def test_a_file_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


@every_file
def test_a_function_has_at_most_60_lines(path: Path) -> None:
    functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f"{function.name}: {length}" for function in functions if (length := lines_of(function)) > 60]
    assert not long


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


@every_file
def test_a_file_is_named_after_what_it_holds(path: Path) -> None:
    assert path.name not in VAGUE


@every_source
def test_a_module_says_in_one_line_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring
    assert docstring.splitlines()[0].endswith(".")


@every_source
def test_no_module_changes_globals(path: Path) -> None:
    assert not [node for node in nodes(path) if isinstance(node, ast.Global)]


@every_source
def test_only_the_command_line_prints(path: Path) -> None:
    if path.is_relative_to(PACKAGE / "cli"):
        return
    calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Spelled in pieces, so that this file does not name them.
    private = re.compile("|".join([r"(?<![\w.])/" + r"work/", r"\.\./" + "shared"]))
    found = []
    for file in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / file).read_text("utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            continue
        found += [f"{file}:{number}" for number, line in enumerate(text.splitlines(), 1) if private.search(line)]
    assert not found
