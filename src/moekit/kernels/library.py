"""Compile and load the C++ kernels once for each machine, with its own compiler; None where there is none."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_bool, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch

FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fopenmp", "-fPIC", "-w")
"""The instruction set is chosen at run time, so that a folder that machines share serves them all. Square roots that
must report errors would not become vectors."""

SWITCH = "MOEKIT_NO_KERNELS"
"""Set to 1, this environment variable leaves the kernels out."""


class ExpertBlock(ctypes.Structure):
    """`moekit_experts` of experts.cpp."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("gate_up", "down", "bounds", "tokens", "places", "weights", "groups", "hidden", "inners")
        ),
        *((name, c_int64) for name in ("n_experts", "n_groups", "n_tokens", "top_k", "width", "inner")),
        ("bits", c_int32),
        ("threads", c_int32),
    )


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "moekit_level": (),
    "moekit_linear_rows": (c_void_p, c_void_p, c_int, c_int64, c_void_p, *[c_int] * 3),
    "moekit_swiglu_rows": (c_void_p, c_int64, c_void_p, c_int, c_int64, c_int64, c_void_p, *[c_int] * 3),
    "moekit_quantise": (c_void_p, c_int, c_int64, c_int64, c_int, c_int64, c_void_p, c_int, c_int),
    "moekit_adamw": (c_void_p, c_int64, c_double, c_double, c_double, c_double, c_int, c_int),
    "moekit_attend": (c_void_p, c_int, c_int),
    "moekit_attend_backward": (c_void_p, c_int, c_int),
    "moekit_cross_entropy": (c_void_p, c_int, c_void_p, c_int64, c_int64, c_int, c_void_p, c_int, c_int),
    "moekit_norm_forward": (c_void_p, c_int, c_int),
    "moekit_norm_backward": (c_void_p, c_int, c_int),
    "moekit_one_query": (c_void_p, c_int, c_int),
    "moekit_token": (c_void_p, c_int64, c_int64, c_void_p, c_int, c_int),
    "moekit_norm_rows": (*[c_void_p] * 5, c_int64, c_int64, c_float, *[c_int] * 3),
    "moekit_squares": (c_void_p, c_int64, POINTER(c_double), c_int, c_int),
    "moekit_keep_memory": (),
    "moekit_logits": (c_void_p, c_void_p, c_int, *[c_int64] * 3, c_void_p, c_int, c_int),
    "moekit_by_expert": (c_void_p, *[c_int64] * 3, *[c_void_p] * 3),
    "moekit_choose": (c_void_p, c_void_p, c_int64, *[c_void_p] * 3, c_int, c_int),
    "moekit_slopes": (c_void_p, c_void_p, c_int, c_int),
    "moekit_chosen_backward": (*[c_void_p] * 3, c_int64, *[c_void_p] * 2, c_int, c_int),
    "moekit_experts_forward": (POINTER(ExpertBlock), *[c_void_p] * 4),
    "moekit_experts_backward": (POINTER(ExpertBlock), *[c_void_p] * 8),
}
"""What the compiled functions take; where threads and instruction set count, these come last."""

RETURNS = {"moekit_level": c_int, "moekit_token": c_int64, "moekit_by_expert": c_bool}
"""What they return: most nothing."""


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


def reaches(x: torch.Tensor) -> bool:
    """Whether compiled loops can run over the numbers of `x`: in bfloat16 or float32, side by side, on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and x.numel() > 0


def _compiled(compiler: str) -> Path:
    """The library for these sources, this compiler and these flags, made where it is not there yet."""
    sources = {file.name: file.read_bytes() for file in _sources()}
    marked = [compiler.encode(), *(flag.encode() for flag in FLAGS), *sources.values()]
    mark = hashlib.sha256(b"\0".join(marked)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "kernels"
    target = folder / f"kernels-{mark}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole: processes may compile at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as building:
        for name, text in sources.items():
            (Path(building) / name).write_bytes(text)
        _build(compiler, Path(building), target.name)
        (Path(building) / target.name).replace(target)
    return target


def _build(compiler: str, folder: Path, name: str) -> None:
    """Compile the sources in `folder`, side by side, and link them."""
    sources = [file.name for file in sorted(folder.glob("*.cpp"))]
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([compiler, *FLAGS, "-c", source], **quiet) for source in sources]
    codes = [process.wait() for process in started]
    if any(codes):
        raise subprocess.CalledProcessError(1, compiler)
    objects = [Path(source).with_suffix(".o").name for source in sources]
    subprocess.run([compiler, *FLAGS, "-shared", "-o", name, *objects], check=True, **quiet)


def _sources() -> list[Traversable]:
    files = resources.files("moekit.kernels").iterdir()
    return sorted((file for file in files if file.name.endswith((".cpp", ".h"))), key=lambda file: file.name)


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, RETURNS.get(name)
    return found
