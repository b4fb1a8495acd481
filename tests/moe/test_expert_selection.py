"""The router's choice is that of each paper; the bias steers it and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, routing_of, seeds, select
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from moekit.config.routing import TopKRouting
from moekit.moe.selection import Selection
from oracle.compare import relative_error
from oracle.gates import (
    deepseek_moe_gates,
    deepseek_v2_gates,
    deepseek_v3_gates,
    deepseek_v4_gates,
    mixtral_gates,
)

V3 = {"score": "sigmoid", "renormalise": True, "epsilon": 1e-20, "scale": 2.5, "group_score": "top2_sum"}
V4 = {"score": "sqrt_softplus", "renormalise": True, "epsilon": 1e-20, "scale": 1.5}
grouped_sizes = st.tuples(seeds, st.integers(2, 4), st.integers(2, 4), st.data())


def dense(selection: Selection) -> Tensor:
    """Weights as the papers write them: g_i for every expert, 0 where it is not chosen."""
    return torch.zeros_like(selection.scores).scatter(-1, selection.experts, selection.weights)


def each_token(logits: Tensor, gates) -> Tensor:
    return torch.stack([torch.stack(gates(list(token))) for token in logits])


@given(seeds, st.integers(1, 9), st.data())
def test_softmax_then_top_k_is_deepseek_moe(seed: int, n_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    logits = torch.randn(5, n_experts, generator=generator(seed))
    expected = each_token(logits, lambda token: deepseek_moe_gates(token, top_k))
    assert relative_error(dense(select(TopKRouting(), top_k, logits)), expected) <= 1e-5


@given(grouped_sizes)
def test_device_limited_routing_is_deepseek_v2(sizes) -> None:
    seed, n_groups, size, data = sizes
    top_k_groups = data.draw(st.integers(1, n_groups))
    top_k = data.draw(st.integers(1, top_k_groups * size))
    logits = torch.randn(5, n_groups * size, generator=generator(seed))
    rule = TopKRouting(scale=16.0, n_groups=n_groups, top_k_groups=top_k_groups, group_score="max")
    expected = each_token(logits, lambda token: deepseek_v2_gates(token, top_k, n_groups, top_k_groups, 16.0))
    assert relative_error(dense(select(rule, top_k, logits)), expected) <= 1e-5


@given(grouped_sizes, st.sampled_from([0.0, 0.1, 1.0, 10.0]), st.sampled_from(["top2_sum", "top_sum"]))
def test_node_limited_biased_routing_is_deepseek_v3(sizes, strength: float, group_score: str) -> None:
    seed, n_groups, size, data = sizes
    top_k_groups = data.draw(st.integers(1, n_groups))
    top_k = data.draw(st.integers(1, top_k_groups * size))
    source = generator(seed)
    logits = torch.randn(5, n_groups * size, generator=source)
    bias = strength * torch.randn(n_groups * size, generator=source)
    rule = TopKRouting(n_groups=n_groups, top_k_groups=top_k_groups, **V3 | {"group_score": group_score})
    summed = 2 if group_score == "top2_sum" else max(top_k // top_k_groups, 1)
    expected = each_token(
        logits, lambda token: deepseek_v3_gates(token, list(bias), top_k, n_groups, top_k_groups, 2.5, summed)
    )
    assert relative_error(dense(select(rule, top_k, logits, bias)), expected) <= 1e-5


@given(seeds, st.integers(1, 9), st.sampled_from([0.0, 0.1, 10.0]), st.sampled_from([1.0, 8.0]), st.data())
def test_square_root_of_softplus_is_deepseek_v4(
    seed: int, n_experts: int, strength: float, sharpness: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    source = generator(seed)
    logits = sharpness * torch.randn(5, n_experts, generator=source)
    bias = strength * torch.randn(n_experts, generator=source)
    expected = each_token(logits.double(), lambda token: deepseek_v4_gates(token, list(bias), top_k, 1.5))
    assert relative_error(dense(select(TopKRouting(**V4), top_k, logits, bias)), expected) <= 1e-5


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_square_root_of_softplus_agrees_with_transformers(strength: float) -> None:
    config = DeepseekV4Config(hidden_size=12, n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=1.5)
    router, source = DeepseekV4TopKRouter(config), generator(0)
    torch.nn.init.normal_(router.weight, generator=source)
    router.e_score_correction_bias.copy_(strength * torch.randn(16, generator=source))
    logits, weights, experts = router(torch.randn(50, 12, generator=source))
    expected = torch.zeros(50, 16).scatter(-1, experts, weights)
    found = select(TopKRouting(**V4), 4, logits, router.e_score_correction_bias)
    torch.testing.assert_close(dense(found), expected)


@given(seeds, st.integers(2, 9), st.data())
def test_top_k_then_softmax_is_mixtral(seed: int, n_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    logits = torch.randn(5, n_experts, generator=generator(seed))
    expected = each_token(logits, lambda token: mixtral_gates(token, top_k))
    assert relative_error(dense(select(TopKRouting(order="top_k_then_score"), top_k, logits)), expected) <= 1e-5


def test_renormalised_softmax_equals_softmax_of_the_chosen() -> None:
    logits = torch.randn(50, 8, generator=generator(0))
    one = select(TopKRouting(renormalise=True), 3, logits)
    other = select(TopKRouting(order="top_k_then_score"), 3, logits)
    assert relative_error(dense(one), dense(other)) <= 1e-5


def test_without_renormalisation_the_weights_do_not_sum_to_one() -> None:
    weights = select(TopKRouting(), 6, torch.randn(1000, 64, generator=generator(0))).weights
    assert 0.3 < weights.sum(dim=-1).mean() < 0.42


def test_all_experts_chosen_carry_all_the_weight() -> None:
    weights = select(TopKRouting(), 7, torch.randn(20, 7, generator=generator(0))).weights
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(20))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_ties_choose_distinct_experts(score: str) -> None:
    rule = TopKRouting(score=score, n_groups=4, top_k_groups=2, group_score="top2_sum")
    experts = select(rule, 4, torch.zeros(10, 16)).experts
    assert all(len(set(chosen)) == 4 for chosen in experts.tolist())


def test_the_group_scores_of_v2_and_v3_disagree() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.0, 4.0]])
    groups = {"n_groups": 2, "top_k_groups": 1, "score": "sigmoid"}
    assert routing_of(logits, 1, group_score="max", **groups).experts.tolist() == [[0]]
    assert routing_of(logits, 1, group_score="top2_sum", **groups).experts[0, 0] in (2, 3)


def test_the_papers_group_score_follows_top_k() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0, 4.0, 4.0, -9.0, 3.0, 3.0, 3.0]])
    groups = {"n_groups": 3, "top_k_groups": 1, "group_score": "top_sum", "score": "sqrt_softplus"}
    chosen = [set(routing_of(logits, top_k, **groups).experts[0].tolist()) for top_k in (1, 2, 3)]
    assert chosen == [{0}, {3, 4}, {6, 7, 8}]


def test_at_v3s_numbers_the_papers_group_score_is_the_codes() -> None:
    logits = torch.randn(200, 32, generator=generator(5))
    groups = {"n_groups": 8, "top_k_groups": 4}
    one, two = (select(TopKRouting(**V3 | groups | {"group_score": g}), 8, logits) for g in ("top2_sum", "top_sum"))
    assert torch.equal(one.experts, two.experts)


def test_a_huge_bias_moves_the_choice_but_no_weight() -> None:
    logits = torch.randn(40, 8, generator=generator(1))
    bias = torch.zeros(8)
    bias[5] = 1e4
    plain, steered = select(TopKRouting(**V3 | {"renormalise": False}), 3, logits), None
    steered = select(TopKRouting(**V3 | {"renormalise": False}), 3, logits, bias)
    assert (steered.experts == 5).any(dim=-1).all()
    assert not (plain.experts == 5).any(dim=-1).all()
    assert torch.equal(steered.weights, 2.5 * logits.sigmoid().gather(-1, steered.experts))
    assert torch.equal(steered.scores, plain.scores)


@pytest.mark.parametrize("group_score", ["max", "top2_sum", "top_sum"])
def test_a_closed_group_stays_closed_under_a_bias_of_minus_ten(group_score: str) -> None:
    rule = TopKRouting(**V3 | {"group_score": group_score}, n_groups=4, top_k_groups=2)
    logits = torch.randn(200, 16, generator=generator(2))
    experts = select(rule, 6, logits, torch.full((16,), -10.0)).experts
    assert all(len({expert // 4 for expert in chosen}) <= 2 for chosen in experts.tolist())


def test_a_bias_that_is_equal_for_all_changes_nothing() -> None:
    rule = TopKRouting(n_groups=4, top_k_groups=2, **V3)
    logits = torch.randn(50, 16, generator=generator(3))
    plain, shifted = select(rule, 4, logits), select(rule, 4, logits, torch.full((16,), -10.0))
    assert torch.equal(dense(plain) > 0, dense(shifted) > 0)


@pytest.mark.parametrize(
    "settings", [{"renormalise": True}, {"renormalise": True, "score": "sigmoid"}, {"order": "top_k_then_score"}]
)
def test_one_renormalised_expert_gives_the_router_no_gradient(settings: dict) -> None:
    logits = torch.randn(20, 4, generator=generator(4), dtype=torch.float64).requires_grad_()
    routing_of(logits, 1, **settings).weights.square().sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_one_expert_weighted_by_its_score_gives_the_router_a_gradient() -> None:
    logits = torch.randn(20, 4, generator=generator(4), dtype=torch.float64).requires_grad_()
    routing_of(logits, 1).weights.square().sum().backward()
    assert logits.grad.abs().max() > 1e-3


def test_a_score_that_underflows_has_a_finite_gradient() -> None:
    logits = torch.tensor([[-200.0, -105.0, 1.0]]).requires_grad_()
    routing_of(logits, 2, score="sqrt_softplus").weights.sum().backward()
    assert logits.grad.isfinite().all()
