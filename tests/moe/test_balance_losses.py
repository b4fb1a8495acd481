"""Each balance loss equals its formula, and keeps what the papers promise of it."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, routing_of, seeds
from torch import Tensor

from moekit.config import balance as rules
from moekit.config.moe import MoEConfig
from moekit.moe.balance import build_rule
from moekit.moe.balance.rule import BalanceRule
from moekit.moe.routing import Routing
from oracle import balance as oracle

ONE = 0.37
"""A coefficient that no default has."""
N_EXPERTS, TOP_K, DEVICES, REACH = 8, 3, 4, 2

Twin = Callable[[oracle.Choices, oracle.Scores, oracle.Scores], Tensor]
TWINS: dict[type, tuple[dict[str, Any], Twin]] = {
    rules.ExpertLoss: ({}, lambda choices, scores, _: oracle.expert_loss(choices, scores, TOP_K, ONE)),
    rules.DeviceLoss: (
        {"n_devices": DEVICES},
        lambda choices, scores, _: oracle.device_loss(choices, scores, TOP_K, DEVICES, ONE),
    ),
    rules.CommunicationLoss: (
        {"n_devices": DEVICES, "max_devices": REACH},
        lambda choices, scores, _: oracle.communication_loss(choices, scores, DEVICES, REACH, ONE),
    ),
    rules.SequenceLoss: ({}, lambda _, scores, __: oracle.sequence_loss(scores, TOP_K, ONE)),
    rules.RouterZLoss: ({}, lambda _, __, logits: oracle.z_loss(logits, ONE)),
}
SCOPED = [rules.ExpertLoss, rules.DeviceLoss, rules.CommunicationLoss]


def make(cls: type, **settings: Any) -> BalanceRule:
    rule = cls(coefficient=ONE, **TWINS[cls][0], **settings)
    return build_rule(rule, MoEConfig(n_routed=N_EXPERTS, top_k=TOP_K, balance=(rule,)))


def random_logits(seed: int, n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, N_EXPERTS, generator=generator(seed), dtype=torch.float64)


def by_the_formula(cls: type, routing: Routing) -> Tensor:
    tensors = (routing.scores, routing.logits)
    scores, logits = ([list(token) for token in tensor] for tensor in tensors)
    return TWINS[cls][1](routing.experts.tolist(), scores, logits)


def test_every_loss_has_a_formula_to_answer_to() -> None:
    with_loss = {cls for cls in get_args(rules.BalanceRule) if hasattr(cls(), "coefficient")}
    assert with_loss == set(TWINS)


@pytest.mark.parametrize("cls", TWINS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@given(seed=seeds, n_tokens=st.integers(1, 8))
def test_a_loss_equals_its_formula_on_one_sequence(cls: type, score: str, seed: int, n_tokens: int) -> None:
    routing = routing_of(random_logits(seed, n_tokens), TOP_K, score=score)
    torch.testing.assert_close(make(cls).loss(routing), by_the_formula(cls, routing), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", TWINS)
@given(seed=seeds, n_sequences=st.integers(1, 3))
def test_a_loss_over_equal_sequences_is_the_mean_of_theirs(cls: type, seed: int, n_sequences: int) -> None:
    logits = random_logits(seed, 5 * n_sequences)
    whole = make(cls).loss(routing_of(logits, TOP_K, n_sequences))
    parts = [by_the_formula(cls, routing_of(part, TOP_K)) for part in logits.split(5)]
    torch.testing.assert_close(whole, sum(parts) / n_sequences, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", SCOPED)
@pytest.mark.parametrize("scope", ["micro_batch", "batch"])
@given(seed=seeds)
def test_a_loss_over_a_batch_takes_all_its_tokens_as_one(cls: type, scope: str, seed: int) -> None:
    logits = random_logits(seed, 15)
    whole = make(cls, scope=scope).loss(routing_of(logits, TOP_K, 3))
    torch.testing.assert_close(whole, by_the_formula(cls, routing_of(logits, TOP_K)), rtol=1e-6, atol=0)


def test_the_sequence_loss_counts_the_choice_without_the_bias() -> None:
    routing = routing_of(random_logits(0, 8), TOP_K, score="sigmoid")
    steered = routing._replace(experts=torch.tensor([0, 1, 2]).expand(8, 3))
    rule = make(rules.SequenceLoss)
    assert torch.equal(rule.loss(steered), rule.loss(routing))


def test_the_expert_loss_counts_the_experts_really_chosen() -> None:
    routing = routing_of(random_logits(0, 8), TOP_K)
    steered = routing._replace(experts=torch.tensor([0, 1, 2]).expand(8, 3))
    rule = make(rules.ExpertLoss)
    assert not torch.equal(rule.loss(steered), rule.loss(routing))


def test_collapse_multiplies_the_expert_loss_by_experts_over_top_k() -> None:
    logits = torch.full((20, N_EXPERTS), -40.0).index_fill_(1, torch.arange(TOP_K), 40.0)
    loss = make(rules.ExpertLoss).loss(routing_of(logits, TOP_K))
    assert float(loss) == pytest.approx(ONE * N_EXPERTS / TOP_K)


def test_layers_collapsed_onto_different_experts_do_not_look_balanced_together() -> None:
    rule = rules.ExpertLoss(coefficient=ONE)
    loss = build_rule(rule, MoEConfig(n_routed=4, top_k=1, balance=(rule,))).loss
    layers = [routing_of(80.0 * torch.eye(4)[expert].expand(20, 4), 1) for expert in range(4)]
    assert float(sum(loss(routing) for routing in layers) / 4) == pytest.approx(4 * ONE)


def test_a_step_along_the_expert_loss_evens_the_load() -> None:
    logits = (random_logits(0, 200) + torch.linspace(0, 2, N_EXPERTS)).requires_grad_()
    make(rules.ExpertLoss).loss(routing_of(logits, TOP_K)).backward()
    pull = logits.grad.sum(dim=0)
    assert pull[-1] > 0 > pull[0]


@pytest.mark.parametrize("cls", TWINS)
def test_the_gradient_reaches_the_centroids_and_equals_a_finite_difference(cls: type) -> None:
    x = torch.randn(10, 5, generator=generator(0), dtype=torch.float64)
    centroids = torch.randn(N_EXPERTS, 5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    rule = make(cls)
    assert torch.autograd.gradcheck(lambda e: rule.loss(routing_of(x @ e.T, TOP_K, 2)), (centroids,))


@pytest.mark.parametrize("cls", TWINS)
def test_the_loss_of_a_layer_trains_its_router_and_no_expert(cls: type) -> None:
    rule = cls(coefficient=ONE, **TWINS[cls][0])
    layer = random_layer(0, width=5, n_routed=N_EXPERTS, top_k=TOP_K, balance=(rule,))
    routing = layer(torch.randn(2, 7, 5, generator=generator(0))).routing
    layer.balance[rule.kind].loss(routing).backward()
    assert layer.router.centroids.grad.abs().max() > 1e-4
    assert layer.experts.gate_up.grad is None
