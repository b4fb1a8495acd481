"""Experts on sorted rows equal the plain loop, forward and backward, whatever the routing."""

import pytest
import torch
from hypothesis import given
from routing_cases import Decided, Shape, decide, shapes
from torch import Tensor
from torch.func import functional_call

from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from oracle.compare import relative_error
from oracle.mixture import served

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def fast(case: Decided, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    arguments = (x, weights, case.experts.plan(x, case.routing))
    return functional_call(case.experts, {"gate_up": gate_up, "down": down}, arguments)


def obvious(case: Decided, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    routing = case.routing
    experts = routing.experts if routing.served is None else routing.served
    return served(x, experts, weights, gate_up, down)


def leaves(case: Decided) -> list[Tensor]:
    tensors = (case.x, case.routing.weights, case.experts.gate_up, case.experts.down)
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(output: Tensor, inputs: list[Tensor], seed: int) -> list[Tensor]:
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    found = torch.autograd.grad(output, inputs, direction, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(shape=shapes())
def test_experts_equal_the_plain_loop(dtype: torch.dtype, shape: Shape) -> None:
    case = decide(shape, dtype)
    inputs = [tensor.detach() for tensor in leaves(case)]
    expected = obvious(case, *[tensor.float() for tensor in inputs])
    actual = fast(case, *inputs)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= ROUNDING[dtype]


@given(shapes())
def test_gradients_equal_those_of_the_plain_loop(shape: Shape) -> None:
    case = decide(shape)
    mine, theirs = leaves(case), leaves(case)
    actual = gradients(fast(case, *mine), mine, shape.seed)
    expected = gradients(obvious(case, *theirs).requires_grad_(), theirs, shape.seed)
    for name, one, other in zip(("x", "weights", "gate_up", "down"), actual, expected, strict=True):
        assert relative_error(one, other) <= 1e-5, name


@given(shapes())
def test_gradients_in_bfloat16_are_right_to_its_rounding(shape: Shape) -> None:
    case = decide(shape, torch.bfloat16)
    mine, theirs = leaves(case), [leaf.detach().float().requires_grad_() for leaf in leaves(case)]
    actual = gradients(fast(case, *mine), mine, shape.seed)
    expected = gradients(obvious(case, *theirs).requires_grad_(), theirs, shape.seed)
    for name, one, other in zip(("x", "weights", "gate_up", "down"), actual, expected, strict=True):
        assert one.dtype == (torch.float32 if name == "weights" else torch.bfloat16)
        assert relative_error(one, other) <= 2**-5, name


@pytest.mark.parametrize("pattern", ["any", "same_for_all", "with_holes"])
@pytest.mark.parametrize("drops", [False, True])
def test_gradients_equal_finite_differences(pattern: str, drops: bool) -> None:
    case = decide(Shape(3, 5, 4, 2, 3, 2, pattern, drops), torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: fast(case, *inputs), leaves(case))


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    case = decide(Shape(0, 6, 5, 2, 4, 3, "same_for_all", False))
    idle = sorted(set(range(5)) - set(case.routing.experts.flatten().tolist()))
    inputs = leaves(case)
    _, _, gate_up, down = gradients(fast(case, *inputs), inputs, 0)
    assert len(idle) == 3
    assert not gate_up[idle].any()
    assert not down[idle].any()


def test_no_tokens_give_no_rows_and_gradients_of_zero() -> None:
    case = decide(Shape(0, 0, 4, 2, 3, 2, "any", False))
    inputs = leaves(case)
    output = fast(case, *inputs)
    assert output.shape == (0, 3)
    for gradient in gradients(output, inputs, 0):
        assert not gradient.any()


def test_a_token_with_no_expert_comes_out_as_zero() -> None:
    case = decide(Shape(0, 3, 4, 2, 3, 2, "any", False))
    routing = case.routing._replace(experts=case.routing.experts.index_fill(0, torch.tensor(1), -1))
    y = case.experts(case.x, routing.weights, dispatch(routing))
    assert not y[1].any()
    assert y[0].any()


def test_a_dropped_place_counts_as_empty() -> None:
    case = decide(Shape(1, 6, 4, 3, 5, 4, "any", True))
    empty = case.routing._replace(experts=case.routing.served, served=None)
    one, other = (case.experts(case.x, r.weights, dispatch(r)) for r in (case.routing, empty))
    assert torch.equal(one, other)


def test_only_the_inputs_that_ask_for_a_gradient_get_one() -> None:
    case = decide(Shape(0, 4, 4, 2, 3, 2, "any", False))
    block: Experts = case.experts.requires_grad_(False)
    x = case.x.clone().requires_grad_()
    block(x, case.routing.weights, dispatch(case.routing)).sum().backward()
    assert x.grad is not None
    assert block.gate_up.grad is None
