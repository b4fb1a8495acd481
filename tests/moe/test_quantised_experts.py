"""A layer with quantised experts is the sum over restored experts, whatever the routing, and reads no other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.config.errors import InputError
from moekit.config.quantisation import Groups
from moekit.kernels import packed
from moekit.kernels.few_rows import rounded
from moekit.kernels.groups import Grouped, quantise, restore
from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from moekit.moe.quantised import weighted_sum
from moekit.moe.routing import Routing

seeds = st.integers(0, 2**31 - 1)
WIDTH, INNER = 64, 32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacks(n_experts: int, groups: Groups, seed: int) -> tuple[Grouped, Grouped]:
    source = generator(seed)
    gate_up = torch.randn(n_experts, 2 * INNER, WIDTH, generator=source) / WIDTH**0.5
    down = torch.randn(n_experts, WIDTH, INNER, generator=source) / INNER**0.5
    return quantise(gate_up, groups.bits, groups.size), quantise(down, groups.bits, groups.size)


def one_of(stack: Grouped, expert: int) -> Grouped:
    return stack._replace(rows=stack.rows[expert])


def by_hand(x: Tensor, routing: Routing, gate_up: Grouped, down: Grouped) -> Tensor:
    """Token by token, place by place."""
    first, second = restore(gate_up), restore(down)
    out = torch.zeros_like(x)
    for token, row in enumerate(rounded(x, gate_up.group)):
        for expert, weight in zip(routing.experts[token].tolist(), routing.weights[token], strict=True):
            if expert >= 0:
                gate, up = (first[expert] @ row).chunk(2)
                inner = rounded((torch.nn.functional.silu(gate) * up).unsqueeze(0), gate_up.group)
                out[token] += weight * (second[expert] @ inner[0])
    return out


@pytest.mark.parametrize("bits", [4, 8])
@given(seed=seeds, n_tokens=st.integers(0, 40), n_experts=st.integers(1, 6), multiple=st.sampled_from([1, 4]))
def test_experts_add_up_as_by_hand(bits: int, seed: int, n_tokens: int, n_experts: int, multiple: int) -> None:
    groups, source = Groups(bits, 32), generator(seed)
    gate_up, down = stacks(n_experts, groups, seed)
    experts = torch.randint(-1, n_experts, (n_tokens, 2), generator=source)
    weights = torch.rand(n_tokens, 2, generator=source).masked_fill(experts < 0, 0)
    scores = torch.rand(n_tokens, n_experts, generator=source)
    routing = Routing(experts, weights, scores, scores)
    x = torch.randn(n_tokens, WIDTH, generator=source)
    read = set()

    def matrices_of(expert: int) -> tuple[Grouped, Grouped]:
        read.add(expert)
        return one_of(gate_up, expert), one_of(down, expert)

    found = weighted_sum(x, weights, dispatch(routing, multiple), matrices_of)
    expected = by_hand(x, routing, gate_up, down)
    # Between the products, a number near the middle of two steps may round either way.
    assert float((found - expected).norm()) <= 1e-2 * float(expected.norm()) + 1e-6
    assert read == set(experts[experts >= 0].tolist())


def test_stacked_rows_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST", {})  # torch's own products round otherwise
    groups = Groups(4, 32)
    gate_up, down = stacks(3, groups, 0)
    layer = Experts(3, WIDTH, INNER).eval()
    layer.groups = groups
    layer.gate_up = torch.nn.Parameter(gate_up.rows, requires_grad=False)
    layer.down = torch.nn.Parameter(down.rows, requires_grad=False)
    experts, x = torch.tensor([[0, 2], [1, 2], [2, 0]]), torch.randn(3, WIDTH, generator=generator(1))
    routing = Routing(experts, torch.rand(3, 2), torch.rand(3, 3), torch.rand(3, 3))
    found = layer(x, routing.weights, dispatch(routing))
    expected = by_hand(x, routing, gate_up, down)
    assert float((found - expected).norm()) < 1e-2 * float(expected.norm())


@pytest.mark.parametrize("which", [0, 1])
def test_neither_tokens_nor_weights_get_a_gradient(which: int) -> None:
    gate_up, down = stacks(2, Groups(8, 32), 0)
    experts = torch.tensor([[0], [1]])
    inputs = [torch.randn(2, WIDTH), torch.rand(2, 1)]
    inputs[which].requires_grad_()
    routing = Routing(experts, inputs[1], torch.rand(2, 2), torch.rand(2, 2))

    def matrices_of(expert: int) -> tuple[Grouped, Grouped]:
        return one_of(gate_up, expert), one_of(down, expert)

    found = weighted_sum(*inputs, dispatch(routing), matrices_of)
    with pytest.raises(InputError, match="give no gradients") as error:
        found.sum().backward()
    assert "convert" in error.value.hint
