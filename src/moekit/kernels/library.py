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
from pathlib import Path
from typing import Any

import torch

FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fopenmp", "-fPIC", "-w")
"""The instruction set is chosen at run time, so that a folder that machines share serves them all. Square roots that
must report errors would not become vectors."""

SWITCH = "MOEKIT_NO_KERNELS"
"""Set to 1, this environment variable leaves the kernels out."""


class ExpertBlock(ctypes.Structure):
    """`moekit_experts` of experts.h."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                "gate_up",
                "down",
                "bounds",
                "tokens",
                "places",
                "weights",
                "row_weights",
                "groups",
                "hidden",
                "inners",
            )
        ),
        *((name, c_int64) for name in ("n_experts", "n_groups", "n_tokens", "top_k", "width", "inner", "room_rows")),
        ("bits", c_int32),
        ("threads", c_int32),
        ("scatters", c_int32),
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
    "moekit_large_pages": (c_void_p, c_int64),
    "moekit_logits": (c_void_p, c_void_p, c_int, *[c_int64] * 3, c_void_p, c_int, c_int),
    "moekit_logits_backward": (*[c_void_p] * 3, c_int, *[c_int64] * 3, c_void_p, c_void_p, c_int, c_int),
    "moekit_by_expert": (c_void_p, *[c_int64] * 3, *[c_void_p] * 3, c_int),
    "moekit_choose": (c_void_p, c_void_p, c_int, c_int64, c_int64, *[c_void_p] * 5, c_int, c_int),
    "moekit_slopes": (c_void_p, c_void_p, c_int, c_int),
    "moekit_chosen_backward": (*[c_void_p] * 3, c_int64, *[c_void_p] * 2, c_int, c_int),
    "moekit_experts_forward": (POINTER(ExpertBlock), *[c_void_p] * 4),
    "moekit_experts_backward": (POINTER(ExpertBlock), *[c_void_p] * 9),
}
"""What the compiled functions take; where threads and instruction set count, these come last."""

RETURNS = {"moekit_level": c_int, "moekit_token": c_int64, "moekit_by_expert": c_bool}
"""What they return: most nothing."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are switched off or cannot be compiled."""
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        return _typed(ctypes.CDLL(os.fspath(_compiled(compiler))))
    except (OSError, subprocess.CalledProcessError):
        return None


def kernels() -> ctypes.CDLL:
    """The compiled kernels, for whoever knows that they are there."""
    found = library()
    assert found is not None
    return found


def pending() -> bool:
    """Whether `library` will compile first, which takes some ten seconds."""
    compiler = _compiler()
    return compiler is not None and not _target(compiler, _sources()).is_file()


def reaches(x: torch.Tensor) -> bool:
    """Whether compiled loops can run over the numbers of `x`: in bfloat16 or float32, side by side, on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous() and x.numel() > 0


def _compiler() -> str | None:
    """The machine's compiler; None where there is none, or kernels are switched off."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if os.environ.get(SWITCH) == "1" else found


def _target(compiler: str, sources: dict[str, bytes]) -> Path:
    """Where the library for these sources, this compiler and these flags belongs."""
    marked = [compiler.encode(), *(flag.encode() for flag in FLAGS), *sources.values()]
    mark = hashlib.sha256(b"\0".join(marked)).hexdigest()[:16]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cached / "moekit" / "kernels" / f"kernels-{mark}.so"


def _compiled(compiler: str) -> Path:
    """The library, made where it is not there yet."""
    sources = _sources()
    target = _target(compiler, sources)
    if target.is_file():
        return target
    folder = target.parent
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


def _sources() -> dict[str, bytes]:
    """Text by name, in the order of names."""
    files = sorted(resources.files("moekit.kernels").iterdir(), key=lambda file: file.name)
    return {file.name: file.read_bytes() for file in files if file.name.endswith((".cpp", ".h"))}


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, RETURNS.get(name)
    return found
