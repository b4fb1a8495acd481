"""Auxiliary-loss-free balancing: the bias follows the load of each step, and nothing else moves it."""

from typing import Any, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, routing_of

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.config.routing import ProjectionRouting, TopKRouting, TwoPoolRouting
from moekit.moe.balance import build_balance, selection_bias
from moekit.moe.balance.bias import Rule
from moekit.moe.selection import Tokens
from moekit.moe.selection.top_k import select_top_k
from moekit.moe.stats import load, max_violation
from oracle import balance as oracle

TOP_K = TopKRouting()
UPDATES = get_args(get_type_hints(BiasBalance)["update"])


def bias_rule(n_routed: int, rate: float = 0.001, top_k: int = 1, routing: Any = TOP_K, **settings: Any) -> Rule:
    rule = BiasBalance(rate=rate, **settings)
    return Rule(rule, MoEConfig(n_routed=n_routed, top_k=top_k, routing=routing, balance=(rule,)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.sampled_from([0.0, 0.001, 0.5]))
def test_each_step_moves_the_bias_by_the_rate_towards_the_mean_load(counts: list[int], rate: float) -> None:
    rule = bias_rule(len(counts), rate)
    rule.after_step(torch.tensor(counts))
    mean = sum(counts) / len(counts)
    expected = [rate * ((count < mean) - (count > mean)) for count in counts]
    torch.testing.assert_close(rule.bias().data, torch.tensor(expected))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("centred", [False, True])
@given(st.lists(st.lists(st.integers(0, 50), min_size=5, max_size=5), max_size=4))
def test_the_bias_follows_the_formula_step_by_step(update: str, centred: bool, loads: list[list[int]]) -> None:
    rule, expected = bias_rule(5, 0.25, update=update, centred=centred), [0.0] * 5
    for counts in loads:
        rule.after_step(torch.tensor(counts))
        expected = oracle.bias_step(expected, counts, 0.25, update, centred)
    torch.testing.assert_close(rule.selection_bias.data, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("routing", [TwoPoolRouting(n_common=2), ProjectionRouting()], ids=lambda r: r.kind)
def test_each_pool_is_led_to_its_own_mean(update: str, routing: Any) -> None:
    rule = bias_rule(8, 0.25, 3, routing, update=update, centred=True)
    load, expected = torch.randint(0, 50, (sum(rule.pools),), generator=generator(0)), []
    rule.after_step(load)
    for part in load.split(rule.pools):
        expected += oracle.bias_step([0.0] * len(part), part.tolist(), 0.25, update, True)
    torch.testing.assert_close(rule.selection_bias.data, torch.tensor(expected))


def test_a_proportional_update_does_not_depend_on_the_size_of_the_batch() -> None:
    one, two = bias_rule(3, update="proportional"), bias_rule(3, update="proportional")
    one.after_step(torch.tensor([1, 2, 6]))
    two.after_step(torch.tensor([100, 200, 600]))
    torch.testing.assert_close(one.bias().data, two.bias().data)


def test_a_centred_bias_makes_the_same_choices() -> None:
    logits, experts = torch.randn(200, 8, generator=generator(0)) + torch.linspace(0, 2, 8), []
    for centred in (False, True):
        rule = bias_rule(8, 0.01, centred=centred)
        for _ in range(50):
            rule.after_step(load(routing_of(logits, 2, bias=rule.bias())))
        assert (rule.bias().mean().abs() < 1e-6) == centred
        experts.append(routing_of(logits, 2, bias=rule.bias()).experts)
    assert torch.equal(*experts)


def test_a_multiplicative_bias_is_a_factor_of_the_scores_and_none_of_the_weights() -> None:
    rule = BiasBalance(update="multiplicative")
    layer = random_layer(0, width=4, n_routed=4, top_k=1, balance=(rule,))
    assert selection_bias(layer.balance) is None
    x = torch.randn(9, 4, generator=generator(0))
    layer.balance["bias"].selection_bias.data.copy_(torch.tensor([0.0, 0.0, 1e6, 0.0]))
    routing = layer(x).routing
    assert (routing.experts == 2).all()
    assert torch.equal(routing.weights, routing.scores[:, 2:3])


def test_from_the_last_step_on_the_bias_stays() -> None:
    rule = bias_rule(2, 0.25, until_step=2, centred=True)
    for _ in range(5):
        rule.after_step(torch.tensor([3, 1]))
    assert rule.bias().tolist() == [-0.5, 0.5]


def test_the_steps_are_counted_across_a_restart_in_float32() -> None:
    layer, other = (
        random_layer(0, torch.bfloat16, width=4, n_routed=2, top_k=1, balance=(BiasBalance(until_step=300),))
        for _ in range(2)
    )
    for _ in range(299):
        layer.balance["bias"].after_step(torch.tensor([1, 1]))
    other.load_state_dict(layer.state_dict())
    for _ in range(3):
        other.balance["bias"].after_step(torch.tensor([3, 1]))
    torch.testing.assert_close(other.balance["bias"].bias().data, torch.tensor([-0.001, 0.001]))


def test_only_a_rule_that_ends_has_a_second_tensor() -> None:
    assert list(bias_rule(4).state_dict()) == ["selection_bias"]
    assert list(bias_rule(4, until_step=1).state_dict()) == ["selection_bias", "steps"]


def test_two_steps_move_the_bias_twice() -> None:
    rule = bias_rule(2, 0.25)
    for _ in range(2):
        rule.after_step(torch.tensor([3, 1]))
    assert rule.bias().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_moves_no_bias(training: bool) -> None:
    layer = random_layer(0, width=4, balance=(BiasBalance(rate=0.1, until_step=5),)).train(training)
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


@pytest.mark.parametrize(("update", "rate"), [("sign", 0.002), ("proportional", 0.01), ("multiplicative", 0.005)])
def test_repeated_steps_balance_a_skewed_router(update: str, rate: float) -> None:
    rule = bias_rule(8, rate, update=update)
    logits = torch.randn(2000, 8, generator=generator(0)) + torch.linspace(0, 2, 8)

    def loads() -> torch.Tensor:
        steered = Tokens(logits, rule.bias(), rule.factor())
        found = select_top_k(TopKRouting(), 2, logits, steered)
        return torch.bincount(found.experts.flatten(), minlength=8)

    def violation_after(steps: int) -> float:
        for _ in range(steps):
            rule.after_step(loads())
        return float(max_violation(loads()))

    assert violation_after(0) > 0.9
    assert violation_after(300) < 0.1
