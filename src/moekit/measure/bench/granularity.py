"""Few wide experts or many narrow ones, at the same active width: what the number of experts costs."""

from collections.abc import Callable, Iterator

import torch

from moekit.measure.bench.layer import Program, entrant, forward, programs, training_step
from moekit.measure.bench.row import Kind, Row, time_row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.shapes import LayerShape
from moekit.measure.bench.turns import OURS, take_turns

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
    beside = _beside(setting, shapes, copies, step)
    for shape, seconds in zip(shapes, beside, strict=True):
        entrants = [
            entrant(each, 0.0, step(each, shape)) for each in programs(setting.peers, shape, DTYPE, copies(shape))
        ]
        passes = "forward + backward" if kind == "train" else "forward"
        label = f"layer, {passes}, {DTYPE}: {shape.words()}"
        timings = take_turns(entrants, setting.pace)
        row = time_row(f"experts-{kind}-{shape.n_routed}", kind, label, timings, 1000)
        yield row._replace(details={"to_fastest": seconds / min(beside)})


def _beside(
    setting: Setting,
    shapes: tuple[LayerShape, ...],
    copies: Callable[[LayerShape], int],
    step: Callable[[Program, LayerShape], Callable[[], object]],
) -> list[float]:
    """Seconds of moekit's layers of all shapes, which take turns: memory may be faster from one minute to the next."""
    ours = [next(programs(frozenset(), shape, DTYPE, copies(shape))) for shape in shapes]
    entrants = [
        entrant(each, 0.0, step(each, shape))._replace(program=f"{OURS} {shape.n_routed}")
        for each, shape in zip(ours, shapes, strict=True)
    ]
    return [timing.seconds for timing in take_turns(entrants, setting.pace)]


def _copies(setting: Setting, shape: LayerShape) -> int:
    """Layers whose weights are more than a cache holds."""
    layer_bytes = 3 * shape.width * shape.expert_width * shape.n_routed * torch.bfloat16.itemsize
    return max(-(-setting.sizes.rotate_bytes // layer_bytes), 1)
