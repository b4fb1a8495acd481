"""One mixture-of-experts layer: a training step, many tokens at once, and single tokens."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from moekit.measure.bench.limits import dense_product, reading
from moekit.measure.bench.processes import Job, in_processes
from moekit.measure.bench.row import Row, rate_row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.shapes import DIRECTIONS, LayerShape, layer_config
from moekit.measure.bench.turns import OURS, Entrant, clocked, take_turns
from moekit.measure.machine import DTYPES
from moekit.measure.models import fill
from moekit.measure.peers import transformers
from moekit.moe.layer import MoE
from moekit.tensors import Float, Tensor

DIFFERENT_TOKENS = 32
"""Tokens that are decoded in turn, so that they come to different experts."""


class Program(NamedTuple):
    """A program's layers, which all compute the same function, and what applies one to tokens."""

    program: str
    variant: str
    layers: list[nn.Module]
    apply: Callable[[nn.Module, Tensor], Tensor]


def training(setting: Setting) -> Iterator[Row]:
    """Forward and backward of the mean square, with gradients of all weights and of the tokens.

    Each program has a process of its own: where moekit trains, freed memory is kept, which would serve the others, too.
    """
    shape = setting.sizes.trained
    variants = [(OURS, "")]
    if transformers.NAME in setting.peers:
        variants += [(transformers.NAME, back_end) for back_end in transformers.back_ends(shape.tokens)]
    for dtype in ("float32", "bfloat16"):
        amount = shape.flops * DIRECTIONS / 1e9
        jobs = [Job(*each, _own_training_step, (setting.peers, each, shape, dtype)) for each in variants]
        with in_processes(jobs, amount) as entrants:
            timings = take_turns([*entrants, dense_product(dtype, setting.sizes.side)], setting.pace)
        label = f"layer, forward + backward, {dtype}: {shape.words()}"
        yield rate_row(f"layer-train-{dtype}", "train", label, "GFLOP/s", timings)


def prefill(setting: Setting) -> Iterator[Row]:
    """Forward with as many tokens as a prompt has."""
    shape = setting.sizes.large
    entrants = [
        entrant(each, shape.flops / 1e9, forward(each, shape)) for each in programs(setting.peers, shape, "bfloat16")
    ]
    timings = take_turns([*entrants, dense_product("bfloat16", setting.sizes.side)], setting.pace)
    yield rate_row("layer-prefill", "prefill", f"layer, forward, bfloat16: {shape.words()}", "GFLOP/s", timings)


def decode(setting: Setting) -> Iterator[Row]:
    """Forward with one token, another one each time: how fast the weights that it meets are read."""
    shape = setting.sizes.large._replace(tokens=1)
    amount = shape.active_weights * torch.bfloat16.itemsize / 1e9
    entrants = [entrant(each, amount, forward(each, shape)) for each in programs(setting.peers, shape, "bfloat16")]
    timings = take_turns([*entrants, reading(setting.sizes.read_bytes)], setting.pace)
    yield rate_row("layer-decode", "decode", f"layer, forward, bfloat16: {shape.words()}", "GB/s", timings)


def programs(peers: frozenset[str], shape: LayerShape, dtype: str, copies: int = 1) -> Iterator[Program]:
    """moekit and those of its peers, with `copies` of the layer each."""
    yield Program(OURS, "", [_our_layer(shape, DTYPES[dtype]) for _ in range(copies)], lambda layer, x: layer(x).y)
    if transformers.NAME in peers:
        for back_end, layers in transformers.layers(shape, DTYPES[dtype], copies):
            yield Program(transformers.NAME, back_end, layers, lambda layer, x: layer(x))


def entrant(program: Program, amount: float, step: Callable[[], object]) -> Entrant:
    """`program` takes part with `step`, which does `amount` of the row's unit."""
    return Entrant(program.program, program.variant, amount, clocked(step))


def training_step(program: Program, shape: LayerShape, dtype: str) -> Callable[[], object]:
    """Gradients of the mean square of the first layer's output."""
    layer = program.layers[0]
    x = tokens_of(shape, DTYPES[dtype])[0].requires_grad_()

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        program.apply(layer, x).float().pow(2).mean().backward()

    return step


def forward(program: Program, shape: LayerShape) -> Callable[[], Tensor]:
    """The next tokens through the next layer in bfloat16, without gradients."""
    tokens = tokens_of(shape, torch.bfloat16)
    number = 0

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal number
        number += 1
        return program.apply(program.layers[number % len(program.layers)], tokens[number % len(tokens)])

    return step


def tokens_of(shape: LayerShape, dtype: torch.dtype) -> Float[Tensor, "N one T D"]:
    """What is fed to the layer, one after the other: several single tokens, or one batch of many."""
    n = DIFFERENT_TOKENS if shape.tokens == 1 else 1
    numbers = torch.randn(n, 1, shape.tokens, shape.width, generator=torch.Generator().manual_seed(0))
    return numbers.to(dtype)


def _own_training_step(
    peers: frozenset[str], variant: tuple[str, str], shape: LayerShape, dtype: str
) -> Callable[[], object]:
    """That of one program, in a process of its own."""
    own = next(each for each in programs(peers, shape, dtype) if (each.program, each.variant) == variant)
    return training_step(own, shape, dtype)


def _our_layer(shape: LayerShape, dtype: torch.dtype) -> MoE:
    with torch.device("meta"):
        layer = MoE(layer_config(shape)).to(dtype)
    layer.to_empty(device="cpu")
    fill(layer)
    return layer
