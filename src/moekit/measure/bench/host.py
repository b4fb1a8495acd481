"""The machine, and the programs on it, as a result must name them."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekit import __version__
from moekit.kernels.library import library
from moekit.measure.bench.limits import dense_product, reading
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.turns import take_turns
from moekit.measure.machine import vector_bandwidth
from moekit.measure.peers.installed import PEERS, found_version
from moekit.tensors.memory import memory_bytes

FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Instructions that decide how fast products are."""

LEVELS = ("plain", "AVX2", "AVX512")
"""Of moekit's compiled code."""


class Host(NamedTuple):
    """What ran where, on which day, and the machine's limits in GFLOP/s and GB/s: medians, but the best that products
    with one vector read, which is what decoding does."""

    date: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    kernels: str
    versions: dict[str, str]
    limits: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """What scripts read; these names stay."""
        return {**self._asdict(), "flags": list(self.flags)}


def this_host(setting: Setting) -> Host:
    """Describe this machine, and measure its limits."""
    cpu, flags = _processor()
    compiled = library()
    packages = ["torch", *(package for packages in PEERS.values() for package in packages)]
    versions = {package: version for package in packages if (version := found_version(package)) is not None}
    sizes = setting.sizes
    limits = [dense_product(dtype, sizes.side) for dtype in ("float32", "bfloat16")]
    timings = take_turns([*limits, reading(sizes.read_bytes)], setting.pace)
    return Host(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        cpu=cpu,
        flags=flags,
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes(),
        kernels="none" if compiled is None else LEVELS[compiled.moekit_level()],
        versions={"moekit": __version__, "python": platform.python_version(), **versions},
        limits={
            **{timing.variant: timing.amount / timing.seconds for timing in timings},
            "read by vector products bfloat16": vector_bandwidth(torch.bfloat16, sizes.read_bytes) / 1e9,
        },
    )


def _processor() -> tuple[str, tuple[str, ...]]:
    """The name of the processor, and those of FLAGS that it has; less is known where there is no /proc."""
    info = Path("/proc/cpuinfo")
    fields = dict[str, str]()
    for line in info.read_text("utf-8").splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    own = fields.get("flags", "").split()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields:
        # Clouds call processors of several generations by one name.
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name, tuple(flag for flag in FLAGS if flag in own)
