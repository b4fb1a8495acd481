"""How a `config.json` says that weights are stored in FP8 blocks or in groups of whole numbers, and how we say it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moekit.config.errors import check

KEY = "quantization_config"

SCALE = "_scale_inv"
"""What the name of a tensor in FP8 blocks adds to name its scales."""

BITS = (8, 4)
"""Of a number in a group."""

GROUP_SIZES = (32, 64, 128)
"""Numbers that may share a scale and a least value."""

LAYOUT = 1
"""The order of the bytes in a row, `moekit.kernels.groups`: a number that changes with it."""


class Fp8Blocks(NamedTuple):
    """E4M3 numbers with one float32 scale for each block of rows and columns, by which they are multiplied."""

    rows: int = 128
    columns: int = 128


class Groups(NamedTuple):
    """Numbers of `bits` bits in groups of `size` along a row, each with a scale and a least value in float16.

    `kept` are the patterns of the tensors that were left as they were; which these are, the tensors' types tell.
    """

    bits: int
    size: int
    kept: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """In the words of the planner: int4/64."""
        return f"int{self.bits}/{self.size}"


Quantisation = Fp8Blocks | Groups


def read_quantisation(data: Mapping[str, Any]) -> Quantisation | None:
    """What `quantization_config` of a `config.json` says. Raises ConfigError for another format."""
    found = data.get(KEY)
    if found is None:
        return None
    check(isinstance(found, dict), KEY, f"{found!r} is not an object")
    hint = "moekit reads its own groups and FP8 in blocks (quant_method fp8); convert it to bfloat16 elsewhere"
    method = found.get("quant_method")
    check(method in ("fp8", "moekit"), f"{KEY}.quant_method", f"{method!r} is not supported", hint)
    return _groups(found) if method == "moekit" else _fp8_blocks(found, hint)


def _fp8_blocks(found: Mapping[str, Any], hint: str) -> Fp8Blocks:
    check(found.get("fmt", "e4m3") == "e4m3", f"{KEY}.fmt", f"{found.get('fmt')!r} is not supported", hint)
    block = found.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    check(bool(sizes), f"{KEY}.weight_block_size", f"{block!r} is not a pair of sizes", hint)
    return Fp8Blocks(*found["weight_block_size"])


def _groups(found: Mapping[str, Any]) -> Groups:
    hint = "moekit quantize makes such folders anew"
    for key, allowed in (("bits", BITS), ("group_size", GROUP_SIZES), ("layout", (LAYOUT,))):
        value = found.get(key)
        known = type(value) is int and value in allowed
        check(known, f"{KEY}.{key}", f"{value!r} is not {' or '.join(map(str, allowed))}", hint)
    kept = found.get("kept", [])
    words = isinstance(kept, list) and all(isinstance(pattern, str) for pattern in kept)
    check(words, f"{KEY}.kept", f"{kept!r} is no list of patterns", hint)
    return Groups(found["bits"], found["group_size"], tuple(kept))


def write_quantisation(quantisation: Quantisation) -> dict[str, Any]:
    """`quantization_config`: of FP8 blocks as released with DeepSeek-V3, of groups as moekit alone reads it."""
    if isinstance(quantisation, Groups):
        bits, size, kept = quantisation
        return {"quant_method": "moekit", "layout": LAYOUT, "bits": bits, "group_size": size, "kept": list(kept)}
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [quantisation.rows, quantisation.columns],
    }
