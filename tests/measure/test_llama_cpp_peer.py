"""llama.cpp goes on working in a process in which the benchmark used it."""

import subprocess
import sys

import pytest

USE_AND_GO_ON = """
import gc
from pathlib import Path
import llama_cpp
from moekit.measure.peers.llama_cpp import Opened

try:
    Opened(Path("missing.gguf"), 1)
except RuntimeError:
    pass
gc.collect()
assert not llama_cpp.llama_model_load_from_file(b"missing.gguf", llama_cpp.llama_model_default_params())
"""


def test_nothing_of_ours_is_called_after_its_end() -> None:
    pytest.importorskip("llama_cpp")
    done = subprocess.run([sys.executable, "-c", USE_AND_GO_ON], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
