"""Expert dropout (arXiv 2101.03961, section 2.4): in training alone, and exact in both directions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import Decided, Shape, decide, generator, random_layer, shapes
from torch import Tensor
from torch.func import functional_call

from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from moekit.moe.routing import Routing
from oracle.compare import relative_error

LAYER = {"width": 6, "expert_width": 5, "n_routed": 8, "top_k": 3}


def leaves(case: Decided) -> list[Tensor]:
    tensors = (case.x, case.routing.weights, case.experts.gate_up, case.experts.down)
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def with_dropout(case: Decided, share: float, seed: int, *inputs: Tensor) -> Tensor:
    x, weights, gate_up, down = inputs
    case.experts.dropout = share
    arguments = (x, weights, dispatch(case.routing), generator(seed))
    return functional_call(case.experts, {"gate_up": gate_up, "down": down}, arguments)


def obvious(case: Decided, share: float, seed: int, *inputs: Tensor) -> Tensor:
    """Each place by itself, with the numbers that the same seed keeps."""
    x, weights, gate_up, down = inputs
    plan = dispatch(case.routing)
    kept = torch.empty(plan.n_rows, down.shape[-1], dtype=torch.bool).bernoulli_(1 - share, generator=generator(seed))
    served = case.routing.experts if case.routing.served is None else case.routing.served
    out = [token * 0 for token in x]
    for t, experts in enumerate(served.tolist()):
        for place, expert in enumerate(experts):
            if expert >= 0:
                gate, up = (gate_up[expert] @ x[t]).chunk(2)
                inner = torch.where(kept[plan.rows[t, place]], F.silu(gate) * up / (1 - share), 0)
                out[t] = out[t] + weights[t, place] * (down[expert] @ inner)
    return torch.stack(out) if out else x * 0


@given(shapes(), st.sampled_from([0.1, 0.5, 0.9]))
def test_output_and_gradients_equal_the_plain_loop(shape: Shape, share: float) -> None:
    case = decide(shape, torch.float64)
    mine, theirs = leaves(case), leaves(case)
    actual, expected = with_dropout(case, share, shape.seed, *mine), obvious(case, share, shape.seed, *theirs)
    assert relative_error(actual.detach(), expected.detach()) <= 1e-9
    direction = torch.randn(actual.shape, generator=generator(1), dtype=torch.float64)
    one = torch.autograd.grad(actual, mine, direction)
    other = torch.autograd.grad(expected, theirs, direction, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(("x", "weights", "gate_up", "down"), one, other, strict=True):
        assert relative_error(a, b) <= 1e-9, name


@pytest.mark.parametrize("pattern", ["any", "with_holes"])
def test_gradients_equal_finite_differences(pattern: str) -> None:
    case = decide(Shape(3, 5, 4, 2, 3, 4, pattern, False), torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: with_dropout(case, 0.4, 7, *inputs), leaves(case))


def inner_numbers(experts: Experts, source: torch.Generator) -> Tensor:
    """What one expert's second product takes, 2000 times for the same token: its matrix is the identity."""
    experts.down.data.copy_(torch.eye(8))
    x = torch.linspace(-2, 2, 8).expand(2000, 8)
    places = torch.zeros(2000, 1, dtype=torch.long)
    routing = Routing(places, torch.ones(2000, 1), torch.ones(2000, 1), torch.zeros(2000, 1))
    return experts(x, routing.weights, dispatch(routing), source).detach()


def test_a_share_is_zero_the_rest_grows_and_the_mean_stays() -> None:
    experts = Experts(1, 8, 8, dropout=0.25)
    torch.nn.init.normal_(experts.gate_up, generator=generator(0))
    plain = inner_numbers(experts.eval(), generator(1))
    dropped = inner_numbers(experts.train(), generator(1))
    zero = dropped == 0
    assert float(zero.float().mean()) == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(dropped[~zero], (plain / 0.75)[~zero])
    assert (dropped.mean(dim=0) / plain.mean(dim=0) - 1).abs().max() < 0.06


def test_without_dropout_nothing_is_drawn_and_every_bit_is_the_same() -> None:
    x = torch.randn(9, 6, generator=generator(0))
    plain, quiet = random_layer(0, **LAYER), random_layer(0, expert_dropout=0.5, **LAYER).eval()
    source = generator(3)
    before = source.get_state()
    expected = plain(x).y
    assert torch.equal(plain(x, generator=source).y, expected)
    assert torch.equal(quiet(x, generator=source).y, expected)
    assert torch.equal(source.get_state(), before)


def test_the_generator_decides_and_the_global_one_stays() -> None:
    layer = random_layer(0, expert_dropout=0.5, **LAYER)
    x = torch.randn(9, 6, generator=generator(0))
    before = torch.get_rng_state()
    one, same, other = (layer(x, generator=generator(seed)).y for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_routing_and_shared_experts_are_left_alone() -> None:
    layer = random_layer(0, expert_dropout=0.9, n_shared=2, **LAYER)
    layer.experts.down.data.zero_()
    x = torch.randn(9, 6, generator=generator(0))
    training, evaluation = layer(x, generator=generator(1)), layer.eval()(x)
    assert torch.equal(training.y, evaluation.y)
    assert torch.equal(training.routing.weights, evaluation.routing.weights)


def test_experts_read_from_disk_drop_the_same_numbers() -> None:
    layer = random_layer(0, expert_dropout=0.5, n_shared=0, **LAYER)
    x = torch.randn(9, 6, generator=generator(0))
    expected = layer(x, generator=generator(1)).y
    layer.experts.stored = lambda expert: (layer.experts.gate_up[expert], layer.experts.down[expert])
    with torch.no_grad():
        found = layer(x, generator=generator(1)).y
    torch.testing.assert_close(found, expected.detach())


def test_what_dropout_leaves_is_rounded_where_inner_numbers_are() -> None:
    layer = random_layer(0, expert_dropout=0.5, n_shared=0, **LAYER)
    seen: list[Tensor] = []
    layer.experts.round_inner = lambda inner: seen.append(inner) or inner
    layer(torch.randn(40, 6, generator=generator(0)), generator=generator(1))
    assert 0.3 < float((seen[0] == 0).float().mean()) < 0.7


def test_few_rows_in_bfloat16_draw_the_same_dropout_with_and_without_gradients() -> None:
    layer = random_layer(
        0, torch.bfloat16, width=32, expert_width=32, n_routed=4, n_shared=0, top_k=2, expert_dropout=0.5
    )
    x = torch.randn(1, 3, 32, generator=generator(1)).bfloat16()
    layer.train()
    with_gradients = layer(x, generator=generator(2)).y
    with torch.no_grad():
        without = layer(x, generator=generator(2)).y
        other = layer(x, generator=generator(3)).y
    assert torch.equal(with_gradients, without)
    assert not torch.equal(without, other)
