"""How a hub's `config.json` says that weights are stored in FP8 blocks, and how we say it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moekit.config.errors import check

KEY = "quantization_config"

SCALE = "_scale_inv"
"""What the name of a quantised tensor's scales adds to its own."""


class Fp8Blocks(NamedTuple):
    """E4M3 numbers with one float32 scale for each block of rows and columns, by which they are multiplied."""

    rows: int = 128
    columns: int = 128


def read_quantisation(data: Mapping[str, Any]) -> Fp8Blocks | None:
    """What `quantization_config` of a `config.json` says. Raises ConfigError for another format."""
    found = data.get(KEY)
    if found is None:
        return None
    check(isinstance(found, dict), KEY, f"{found!r} is not an object")
    hint = "moekit reads FP8 in blocks (quant_method fp8, weight_block_size); convert it to bfloat16 elsewhere"
    method = found.get("quant_method")
    check(method == "fp8", f"{KEY}.quant_method", f"{method!r} is not supported", hint)
    check(found.get("fmt", "e4m3") == "e4m3", f"{KEY}.fmt", f"{found.get('fmt')!r} is not supported", hint)
    block = found.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    check(bool(sizes), f"{KEY}.weight_block_size", f"{block!r} is not a pair of sizes", hint)
    return Fp8Blocks(*block)


def write_quantisation(blocks: Fp8Blocks) -> dict[str, Any]:
    """`quantization_config`, as released with DeepSeek-V3."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [blocks.rows, blocks.columns],
    }
