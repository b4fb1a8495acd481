"""Few wide experts or many narrow ones, at the same active width: what the number of experts costs."""

from collections.abc import Callable, Iterator

import torch

from moekit.measure.bench.layer import Program, entrant, forward, programs, training_step
from moekit.measure.bench.row import Kind, Row, time_row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.shapes import LayerShape
from moekit.measure.bench.turns import take_turns

DTYPE = "bfloat16"


def training(setting: Setting) -> Iterator[Row]:
    """A training step of each layer."""
    shapes = setting.sizes.granular
    yield from _compared(setting, "train", shapes, lambda _: 1, lambda each, shape: training_step(each, shape, DTYPE))


def decode(setting: Setting) -> Iterator[Row]:
    """One token through one of several such layers, with weights that no cache holds."""
    shapes = tuple(shape._replace(tokens=1) for shape in setting.sizes.granular)
    yield from _compared(setting, "decode", shapes, lambda shape: _copies(setting, shape), forward)


def _compared(
    setting: Setting,
    kind: Kind,
    shapes: tuple[LayerShape, ...],
    copies: Callable[[LayerShape], int],
    step: Callable[[Program, LayerShape], Callable[[], object]],
) -> Iterator[Row]:
    rows = []
    for shape in shapes:
        entrants = [entrant(each, 0.0, step(each, shape)) for each in programs(setting, shape, DTYPE, copies(shape))]
        passes = "forward + backward" if kind == "train" else "forward"
        label = f"layer, {passes}, {DTYPE}: {shape.words()}"
        timings = take_turns(entrants, setting.pace)
        rows.append(time_row(f"experts-{kind}-{shape.n_routed}", kind, label, timings, 1000))
    best = min(row.moekit for row in rows)
    for row in rows:
        yield row._replace(details={"to_fastest": row.moekit / best})


def _copies(setting: Setting, shape: LayerShape) -> int:
    """Layers whose weights are more than a cache holds."""
    layer_bytes = 3 * shape.width * shape.expert_width * shape.n_routed * torch.bfloat16.itemsize
    return max(-(-setting.sizes.rotate_bytes // layer_bytes), 1)
