"""The large mixture-of-experts layer in 4 bits: single tokens, and many at once."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from moekit.config.quantisation import Groups
from moekit.kernels.groups import row_bytes
from moekit.measure.bench.layer import Program, entrant, forward
from moekit.measure.bench.limits import dense_product, reading
from moekit.measure.bench.row import Row, rate_row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.shapes import LayerShape, layer_config
from moekit.measure.bench.turns import OURS, take_turns
from moekit.measure.models import random_quantised

GROUPS = Groups(bits=4, size=64)
"""4.5 bits for a weight, as llama.cpp's Q4_0 has."""


def prefill(setting: Setting) -> Iterator[Row]:
    """Forward with as many tokens as a prompt has."""
    shape = setting.sizes.large
    entrants = [
        entrant(ours := _program(setting, shape, 1), shape.flops / 1e9, forward(ours, shape)),
        dense_product("bfloat16", setting.sizes.side),
    ]
    label = f"layer, forward, 4 bits: {shape.words()}"
    yield rate_row("layer-prefill-int4", "prefill", label, "GFLOP/s", take_turns(entrants, setting.pace))


def decode(setting: Setting) -> Iterator[Row]:
    """Forward with one token, through layers in turn whose weights are more than a cache holds."""
    shape = setting.sizes.large._replace(tokens=1)
    copies = max(-(-setting.sizes.rotate_bytes // _bytes(shape, shape.n_routed)), 1)
    amount = _bytes(shape, shape.top_k) / 1e9
    entrants = [
        entrant(ours := _program(setting, shape, copies), amount, forward(ours, shape)),
        reading(setting.sizes.read_bytes),
    ]
    label = f"layer, forward, 4 bits: {shape.words()}"
    yield rate_row("layer-decode-int4", "decode", label, "GB/s", take_turns(entrants, setting.pace))


def _program(setting: Setting, shape: LayerShape, copies: int) -> Program:
    """The mixtures of a model that has nothing else of any size."""
    small = replace(setting.sizes.deep, vocab_size=64, n_layers=copies, dense_layers=(), width=shape.width)
    moe = replace(layer_config(shape), width=0)
    layers: list[nn.Module] = [*random_quantised(replace(small, moe=moe), GROUPS).moe_layers()]
    return Program(OURS, "", layers, lambda layer, x: layer(x).y)


def _bytes(shape: LayerShape, routed: int) -> int:
    """Of so many routed experts, and the shared ones."""
    expert = 2 * shape.expert_width * row_bytes(shape.width, *GROUPS[:2])
    expert += shape.width * row_bytes(shape.expert_width, *GROUPS[:2])
    return expert * (routed + shape.n_shared)
