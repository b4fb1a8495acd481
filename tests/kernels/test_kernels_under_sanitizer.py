"""The kernels' own tests once more, with accesses to memory and operations watched by the compiler's sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)
FURTHER = (
    "moe/test_compiled_choice.py",
    "moe/test_dispatch.py",
    "moe/test_one_call.py",
    "model/test_token_in_one_call.py",
)
TESTS = (
    *sorted(file for file in HERE.parent.glob("test_*.py") if file != HERE),
    *(HERE.parents[1] / name for name in FURTHER),
)
FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RUN = f"""
import sys
import pytest
from moekit.kernels import library
library.FLAGS = (*library.FLAGS, *{FLAGS!r})
if library.library() is None:
    sys.exit("the kernels do not compile")
sys.exit(pytest.main(sys.argv[1:]))
"""


def runtime() -> str | None:
    """The address sanitizer's library, which must be loaded before all others."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    if compiler is None:
        return None
    command = [compiler, "-print-file-name=libasan.so"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else None


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("tests", TESTS, ids=lambda file: file.stem)
def test_no_kernel_leaves_its_memory(tests: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    preloaded = runtime()
    if preloaded is None:
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": os.fspath(tmp_path_factory.getbasetemp() / "sanitised"),
        "OMP_NUM_THREADS": "2",
    }
    arguments = [
        "-q",
        "-x",
        "-m",
        "not slow",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--capture=no",
        os.fspath(tests),
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        check=False,
        env=environment,
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_sanitizer_would_speak(tmp_path: Path) -> None:
    preloaded = runtime()
    if preloaded is None:
        pytest.skip("the compiler has no address sanitizer")
    source = tmp_path / "wrong.cpp"
    source.write_text('extern "C" int beyond(int n) { int *p = new int[4]; int v = p[n]; delete[] p; return v; }\n')
    built = tmp_path / "wrong.so"
    subprocess.run(["c++", "-shared", "-fPIC", *FLAGS, os.fspath(source), "-o", os.fspath(built)], check=True)
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({os.fspath(built)!r}).beyond(4)"]
    environment = os.environ | {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "0 bytes after 16-byte region" in done.stderr or "insufficient space" in done.stderr
