"""The statistics of a load mean what their names say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import Shape, decide, generator, routing_of, shapes

from moekit.moe.stats import dead_experts, entropy, gate_mass, load, max_violation
from oracle import balance as oracle

loads = st.lists(st.integers(0, 100), min_size=2, max_size=9).filter(any)


@given(shapes())
def test_the_load_counts_every_place_before_drops(shape: Shape) -> None:
    routing = decide(shape).routing
    chosen = routing.experts.flatten().tolist()
    assert load(routing).tolist() == [chosen.count(i) for i in range(shape.n_experts)]


@given(shapes())
def test_the_gate_mass_sums_the_weights_of_each_expert(shape: Shape) -> None:
    routing = decide(shape).routing
    expected = torch.zeros(shape.n_experts)
    for expert, weight in zip(routing.experts.flatten().tolist(), routing.weights.flatten().tolist(), strict=True):
        if expert >= 0:
            expected[expert] += weight
    torch.testing.assert_close(gate_mass(routing), expected)


@given(shapes(), st.integers(1, 4))
def test_padding_is_in_no_count(shape: Shape, n_padding: int) -> None:
    routing = decide(shape).routing
    padding = decide(shape._replace(seed=shape.seed ^ 1, n_tokens=n_padding, drops=False, pattern="any")).routing
    joined = {name: torch.cat([getattr(routing, name), getattr(padding, name)]) for name in routing._fields[:4]}
    mask = torch.arange(shape.n_tokens + n_padding) < shape.n_tokens
    padded = routing._replace(**joined, served=None, mask=mask)
    assert torch.equal(load(padded), load(routing))
    torch.testing.assert_close(gate_mass(padded), gate_mass(routing))


@given(loads)
def test_max_violation_is_the_excess_of_the_largest_load(counts: list[int]) -> None:
    assert float(max_violation(torch.tensor(counts))) == pytest.approx(oracle.max_violation(counts), abs=1e-5)


@given(loads)
def test_entropy_is_relative_to_that_of_equal_loads(counts: list[int]) -> None:
    assert float(entropy(torch.tensor(counts))) == pytest.approx(oracle.entropy(counts), abs=1e-5)


@given(loads)
def test_dead_experts_are_those_without_a_token(counts: list[int]) -> None:
    assert int(dead_experts(torch.tensor(counts))) == counts.count(0)


def test_equal_loads_are_perfect_balance() -> None:
    equal = torch.full((8,), 5)
    assert float(max_violation(equal)) == 0.0
    assert float(entropy(equal)) == pytest.approx(1.0)
    assert int(dead_experts(equal)) == 0


def test_one_expert_with_everything_is_full_collapse() -> None:
    collapsed = torch.tensor([40, 0, 0, 0])
    assert float(max_violation(collapsed)) == 3.0
    assert float(entropy(collapsed)) == 0.0
    assert int(dead_experts(collapsed)) == 3


def test_no_load_at_all_is_no_violation() -> None:
    assert float(max_violation(torch.zeros(4))) == 0.0


def test_layers_collapsed_onto_different_experts_are_each_reported_as_collapsed() -> None:
    layers = [routing_of(10.0 * torch.eye(4)[expert].expand(20, 4), 1) for expert in range(4)]
    loads = torch.stack([load(routing) for routing in layers])
    assert max_violation(loads).tolist() == [3.0] * 4
    assert dead_experts(loads).tolist() == [3] * 4
    assert float(max_violation(loads.sum(dim=0))) == 0.0


def test_gate_mass_and_load_can_disagree() -> None:
    logits = torch.randn(500, 4, generator=generator(0)) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    routing = routing_of(logits, 4)
    assert len(set(load(routing).tolist())) == 1
    assert gate_mass(routing)[0] > 2 * gate_mass(routing)[1]
