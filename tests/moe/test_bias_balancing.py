"""Auxiliary-loss-free balancing: the bias follows the load of each step, and nothing else moves it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, routing_of

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.moe.balance import build_balance, selection_bias
from moekit.moe.balance.bias import Rule
from moekit.moe.stats import load, max_violation


def bias_rule(n_routed: int, rate: float = 0.001) -> Rule:
    rule = BiasBalance(rate=rate)
    return Rule(rule, MoEConfig(n_routed=n_routed, top_k=1, balance=(rule,)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.sampled_from([0.0, 0.001, 0.5]))
def test_each_step_moves_the_bias_by_the_rate_towards_the_mean_load(counts: list[int], rate: float) -> None:
    rule = bias_rule(len(counts), rate)
    rule.after_step(torch.tensor(counts))
    mean = sum(counts) / len(counts)
    expected = [rate * ((count < mean) - (count > mean)) for count in counts]
    torch.testing.assert_close(rule.bias().data, torch.tensor(expected))


def test_two_steps_move_the_bias_twice() -> None:
    rule = bias_rule(2, 0.25)
    for _ in range(2):
        rule.after_step(torch.tensor([3, 1]))
    assert rule.bias().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_moves_no_bias(training: bool) -> None:
    layer = random_layer(0, width=4, balance=(BiasBalance(rate=0.1),)).train(training)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for _ in range(2):
        layer(torch.randn(2, 9, 4, generator=generator(0)))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_small_step_is_not_lost_in_a_bfloat16_layer() -> None:
    layer = random_layer(0, torch.bfloat16, width=4, n_routed=2, top_k=1, balance=(BiasBalance(rate=0.001),))
    rule = layer.balance["bias"]
    rule.bias().data.fill_(0.5)
    rule.after_step(torch.tensor([0, 2]))
    torch.testing.assert_close(rule.bias().data, torch.tensor([0.501, 0.499]), rtol=0, atol=1e-7)


def test_a_bias_survives_a_change_of_precision_to_the_last_bit() -> None:
    layer = random_layer(0, width=4, balance=(BiasBalance(),))
    values = torch.randn(16, generator=generator(0))
    layer.balance["bias"].bias().data.copy_(values)
    layer.to(torch.bfloat16).float()
    assert torch.equal(layer.balance["bias"].bias().data, values)


def test_the_bias_asks_for_no_gradient_and_is_saved() -> None:
    layer = random_layer(0, width=4, balance=(BiasBalance(),))
    assert not layer.balance["bias"].bias().requires_grad
    assert [name for name in layer.state_dict() if name.startswith("balance.bias.")]


def test_the_bias_gets_no_gradient_from_the_output() -> None:
    layer = random_layer(0, width=4, balance=(BiasBalance(),))
    layer(torch.randn(9, 4, generator=generator(0))).y.sum().backward()
    assert layer.balance["bias"].bias().grad is None


def test_without_a_rule_there_is_no_selection_bias() -> None:
    assert selection_bias(build_balance(MoEConfig())) is None


def test_repeated_steps_balance_a_skewed_router() -> None:
    rule = bias_rule(8, rate=0.002)
    logits = torch.randn(2000, 8, generator=generator(0)) + torch.linspace(0, 2, 8)

    def violation_after(steps: int) -> float:
        for _ in range(steps):
            rule.after_step(load(routing_of(logits, 2, bias=rule.bias())))
        return float(max_violation(load(routing_of(logits, 2, bias=rule.bias()))))

    assert violation_after(0) > 0.9
    assert violation_after(300) < 0.1
