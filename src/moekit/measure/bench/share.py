"""What of a layer's training step is not the experts' products: scores, choice, sorting, gathering, weighted sums."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from moekit.measure.bench.layer import programs, tokens_of
from moekit.measure.bench.row import Row
from moekit.measure.bench.setting import Setting
from moekit.measure.bench.turns import Entrant, clocked, take_turns
from moekit.moe.dispatch import dispatch
from moekit.moe.layer import MoE
from moekit.tensors import Float, Tensor

NARROW = (16, 32)
"""Inner widths of experts that have little left to compute; multiples of 16 suit compiled code and torch's products."""


def routing_share(setting: Setting) -> Iterator[Row]:
    """The share of the step, forward and backward, that does not depend on how wide the experts are.

    The same layer, without shared experts, is timed with experts of inner width 16 and 32; the line through both, at
    width 0, is what routing and moving the tokens cost. No step is taken apart, so that it holds however gathering and
    products are merged. The gradient of the output is given: no loss is computed. `at_most` is the step at width 16
    itself, which still does some of the products; `scores_to_sort` is router and dispatch on their own, forward and
    backward.
    """
    whole, dtype = setting.sizes.trained, "bfloat16"
    shapes = [whole, *(whole._replace(expert_width=width, n_shared=0) for width in NARROW)]
    layers = [next(programs(frozenset(), shape, dtype)) for shape in shapes]
    tokens = tokens_of(whole, torch.bfloat16)[0]
    steps = [_without_loss(ours.layers[0], tokens) for ours in layers]
    steps.append(_router_alone(layers[0].layers[0], tokens[0]))
    entrants = [Entrant(f"step {number}", "", 0, clocked(step)) for number, step in enumerate(steps)]
    step, least, less, choice = (timing.seconds for timing in take_turns(entrants, setting.pace))
    details = {"at_most": least / step, "scores_to_sort": choice / step}
    label = f"share of routing and dispatch in a step, {dtype}: {whole.words()}"
    yield Row(
        "layer-train-routing", "train", label, "of 1", (2 * least - less) / step, less_is_better=True, details=details
    )


def _without_loss(layer: nn.Module, tokens: Float[Tensor, "B T D"]) -> Callable[[], object]:
    """Forward and backward from a gradient that is given."""
    x, grad = tokens.clone().requires_grad_(), torch.ones_like(tokens)

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).y.backward(grad)

    return step


def _router_alone(layer: nn.Module, tokens: Float[Tensor, "T D"]) -> Callable[[], object]:
    assert isinstance(layer, MoE)
    router, x = layer.router, tokens.clone().requires_grad_()

    def step() -> None:
        router.zero_grad()
        x.grad = None
        routing = router(x)
        dispatch(routing)
        routing.weights.sum().backward()

    return step
