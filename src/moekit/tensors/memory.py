"""What memory this machine has, and pages of 2 MiB for large tensors."""

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import nn

from moekit.tensors import Tensor

HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
"""The advice that memory be mapped in huge pages, where the system knows it: it is then read a quarter faster."""

COLLAPSE = 25
"""MADV_COLLAPSE of Linux, which Python 3.11 does not name."""

HUGE_BYTES = 2 << 20

GROUP = Path("/sys/fs/cgroup")
"""Where Linux tells of this process's control group (version 2)."""


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less where its control group says so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _group_limit()
    return total if limit is None else min(total, limit)


def spare_bytes() -> int:
    """How much of `memory_bytes` nothing holds, not counting copies of files; all where the system does not say."""
    limit, system = _group_limit(), _figures(Path("/proc/meminfo")).get("MemAvailable:")
    spare = memory_bytes() if system is None else 1024 * system
    if limit is None:
        return spare
    held = _figures(GROUP / "memory.stat")
    return min(spare, limit - held.get("anon", 0) - held.get("shmem", 0) - held.get("kernel", 0))


def _group_limit() -> int | None:
    """Bytes that the control group of this process may use; None where it may use all."""
    file = GROUP / "memory.max"
    text = file.read_text().strip() if file.is_file() else "max"
    return int(text) if text.isdecimal() else None


def _figures(file: Path) -> dict[str, int]:
    """The first number of each line, by the line's first word."""
    lines = (line.split() for line in file.read_text().splitlines()) if file.is_file() else ()
    return {words[0]: int(words[1]) for words in lines}


def map_huge_pages(files: Sequence[mmap.mmap]) -> bool:
    """Ask for huge pages in mapped files; whether the system knows them."""
    if HUGE is None:
        return False
    try:
        for each in files:
            each.madvise(HUGE)
    except OSError:
        return False
    return True


def prefer_huge_pages(tensor: Tensor) -> None:
    """Let memory that was not written to yet be huge pages where the system can. Small tensors are left alone."""
    _advise(tensor, HUGE)


def in_huge_pages(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """New memory for a tensor like this one, in huge pages where the system can; its numbers are whatever was there."""
    tensor = torch.empty_like(like, dtype=dtype)
    prefer_huge_pages(tensor)
    return tensor


def move_to_huge_pages(tensor: Tensor) -> None:
    """As `prefer_huge_pages`, of memory that was written to (Linux 6.1): its pages are copied, which takes as long as
    copying the tensor does."""
    _advise(tensor, HUGE)
    _advise(tensor, COLLAPSE)


class InHugePages(nn.Module):
    """A module whose large parameters go to huge pages when their type or place changes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InHugePages":
        old = self._addresses()
        super()._apply(fn, recurse)
        # A parameter that comes from another device is another object than before.
        for name, address in self._addresses().items():
            if address != old.get(name):
                move_to_huge_pages(getattr(self, name).detach())
        return self

    def _addresses(self) -> dict[str, int]:
        """Where the parameters lie; what is no plain tensor may have no address."""
        own = self._parameters.items()
        return {name: weight.data_ptr() for name, weight in own if weight is not None and type(weight.data) is Tensor}


def _advise(tensor: Tensor, advice: int | None) -> None:
    """Tell the system; where it does not know the advice, nothing happens."""
    # What is no plain tensor may have no address.
    small = tensor.nbytes < 4 * HUGE_BYTES
    if HUGE is None or advice is None or small or type(tensor) is not Tensor or not tensor.is_cpu:
        return
    start = -(-tensor.data_ptr() // HUGE_BYTES) * HUGE_BYTES
    _madvise()(start, (tensor.data_ptr() + tensor.nbytes - start) // HUGE_BYTES * HUGE_BYTES, advice)


@cache
def _madvise() -> "ctypes._NamedFuncPointer":
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
