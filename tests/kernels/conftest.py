"""Compiled code as each instruction set runs it."""

import pytest

from moekit.kernels.library import library


@pytest.fixture
def at_level(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = library()
    if compiled is None or compiled.moekit_level() < level:
        pytest.skip(f"this machine has no compiler, or not the instructions of level {level}")
    monkeypatch.setattr(compiled, "moekit_level", lambda: level)
