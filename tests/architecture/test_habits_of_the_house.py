"""Small files, small functions, whole words, no hidden state. Each test lists who breaks the habit."""

import ast
import re
import subprocess

import pytest
from source_files import PACKAGE, ROOT, name, nodes, sources, sources_and_tests

VAGUE = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py", "manager.py"}


def test_a_file_has_at_most_400_lines() -> None:
    assert not [name(path) for path in sources_and_tests() if len(path.read_text("utf-8").splitlines()) > 400]


def test_a_function_has_at_most_60_lines() -> None:
    long = []
    for path in sources_and_tests():
        functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        long += [f"{name(path)}:{f.lineno} {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno + 1 > 60]
    assert not long


def test_a_file_is_named_after_what_it_holds() -> None:
    assert not [name(path) for path in sources_and_tests() if path.name in VAGUE]


def test_a_module_says_first_what_it_is() -> None:
    assert not [name(path) for path in sources() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]


def test_no_module_changes_globals() -> None:
    assert not [name(path) for path in sources() if any(isinstance(node, ast.Global) for node in nodes(path))]


def test_only_the_command_line_prints() -> None:
    calls = [
        (f"{name(path)}:{node.lineno}", node.func)
        for path in sources()
        if not path.is_relative_to(PACKAGE / "cli")
        for node in nodes(path)
        if isinstance(node, ast.Call)
    ]
    assert not [place for place, function in calls if isinstance(function, ast.Name) and function.id == "print"]


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
