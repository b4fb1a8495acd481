"""Compile and load `linear.cpp`: once for each machine, with the compiler that is there; None where there is none."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
"""The instruction set is chosen at run time, so that a folder that machines share serves them all."""

SWITCH = "MOEKIT_NO_KERNELS"
"""Set to 1, this environment variable leaves the kernels out."""


class Matrix(ctypes.Structure):
    """`moekit_matrix` of linear.cpp."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


class Block(ctypes.Structure):
    """`moekit_block` of linear.cpp."""

    _fields_ = (
        ("gate_up", Matrix),
        ("down", Matrix),
        ("tokens", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("n_rows", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if os.environ.get(SWITCH) == "1" or compiler is None:
        return None
    try:
        return _typed(ctypes.CDLL(os.fspath(_compiled(compiler))))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compiled(compiler: str) -> Path:
    source = resources.files("moekit.kernels") / "linear.cpp"
    text = source.read_bytes()
    mark = hashlib.sha256(b"\0".join([text, compiler.encode(), *(flag.encode() for flag in FLAGS)])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "kernels"
    target = folder / f"linear-{mark}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole: processes may compile at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as building:
        file, made = Path(building) / "linear.cpp", Path(building) / target.name
        file.write_bytes(text)
        subprocess.run([compiler, *FLAGS, "-o", made, file], check=True, capture_output=True)
        made.replace(target)
    return target


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    found.moekit_level.argtypes, found.moekit_level.restype = (), number
    found.moekit_linear.argtypes = (ctypes.POINTER(Matrix), pointer, size, pointer, number, number)
    found.moekit_linear.restype = None
    found.moekit_swiglu.argtypes = (ctypes.POINTER(Block), size, pointer, size, pointer, number, number)
    found.moekit_swiglu.restype = None
    return found
