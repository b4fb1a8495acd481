"""Each balance loss equals its formula, and keeps what the papers promise of it."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, routing_of, seeds
from torch import Tensor

from moekit.config import balance as rules
from moekit.config.moe import MoEConfig
from moekit.config.routing import NoisyTopKRouting, TaskRouting, TopKRouting
from moekit.moe.balance import build_rule
from moekit.moe.balance.rule import BalanceRule
from moekit.moe.routing import Drawn, Routing
from oracle import balance as oracle

ONE = 0.37
"""A coefficient that no default has."""
N_EXPERTS, TOP_K, DEVICES, REACH, COMMON = 8, 3, 4, 2, 3


class Told(NamedTuple):
    """A routing as its twins read it: lists by token."""

    choices: oracle.Choices
    scores: oracle.Scores
    logits: oracle.Scores
    weights: oracle.Scores
    clean: oracle.Scores
    deviation: oracle.Scores
    noisy: oracle.Scores


class Twin(NamedTuple):
    """The settings of a rule, its formula, and the routing it is for where that is another."""

    settings: dict[str, Any]
    formula: Callable[[Told], Tensor]
    routing: Any = TopKRouting()


TWINS: dict[type, Twin] = {
    rules.ExpertLoss: Twin({}, lambda told: oracle.expert_loss(told.choices, told.scores, ONE)),
    rules.DeviceLoss: Twin(
        {"n_devices": DEVICES}, lambda told: oracle.device_loss(told.choices, told.scores, DEVICES, ONE)
    ),
    rules.CommunicationLoss: Twin(
        {"n_devices": DEVICES, "max_devices": REACH},
        lambda told: oracle.communication_loss(told.choices, told.scores, DEVICES, REACH, ONE),
    ),
    rules.SequenceLoss: Twin({}, lambda told: oracle.sequence_loss(told.scores, TOP_K, ONE)),
    rules.RouterZLoss: Twin({}, lambda told: oracle.z_loss(told.logits, ONE)),
    rules.FirstChoiceLoss: Twin({}, lambda told: oracle.first_choice_loss(told.scores, ONE)),
    rules.ImportanceLoss: Twin({}, lambda told: oracle.importance_loss(told.choices, told.weights, N_EXPERTS, ONE)),
    rules.LoadLoss: Twin(
        {},
        lambda told: oracle.load_loss(told.clean, told.noisy, told.deviation, TOP_K, ONE),
        NoisyTopKRouting(),
    ),
    rules.VarianceLoss: Twin({}, lambda told: oracle.variance_loss(told.scores, ONE)),
    rules.EntropyLoss: Twin({}, lambda told: oracle.entropy_loss(told.scores, ONE)),
    rules.CommonMassLoss: Twin(
        {}, lambda told: oracle.common_mass_loss(told.scores, COMMON, ONE), TaskRouting(n_common=COMMON)
    ),
}
SCOPED = [cls for cls in TWINS if hasattr(cls(), "scope")]
BALANCING = [cls for cls in TWINS if cls.balances]


def make(cls: type, top_k: int = TOP_K, **settings: Any) -> BalanceRule:
    """The rule, over one sequence where it has a choice."""
    scope = {"scope": "sequence"} if cls in SCOPED else {}
    rule = cls(coefficient=ONE, **{**TWINS[cls].settings, **scope, **settings})
    return build_rule(rule, MoEConfig(n_routed=N_EXPERTS, top_k=top_k, routing=TWINS[cls].routing, balance=(rule,)))


def random_logits(seed: int, n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, N_EXPERTS, generator=generator(seed), dtype=torch.float64)


def told(routing: Routing) -> Told:
    choices = [[expert for expert in token if expert >= 0] for token in routing.experts.tolist()]
    tensors = (routing.scores, routing.logits, routing.weights, *routing.drawn)
    return Told(choices, *([list(token) for token in tensor] for tensor in tensors))


def by_the_formula(cls: type, routing: Routing) -> Tensor:
    return TWINS[cls].formula(told(routing))


def noisy_routing(logits: Tensor, top_k: int = TOP_K, n_sequences: int = 1, **settings: Any) -> Routing:
    """The routing of noisy logits."""
    deviation = F.softplus(logits)
    noise = deviation * (5 * logits).sin()
    drawn = Drawn(logits - noise, deviation, logits)
    return routing_of(logits, top_k, n_sequences, **settings)._replace(drawn=drawn)


def test_every_loss_has_a_formula_to_answer_to() -> None:
    with_loss = {cls for cls in get_args(rules.BalanceRule) if hasattr(cls(), "coefficient")}
    assert with_loss == set(TWINS)


@pytest.mark.parametrize("cls", TWINS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@given(seed=seeds, n_tokens=st.integers(1, 8))
def test_a_loss_equals_its_formula_on_one_sequence(cls: type, score: str, seed: int, n_tokens: int) -> None:
    if cls is rules.CommonMassLoss:
        score = "softmax"
    routing = noisy_routing(random_logits(seed, n_tokens), score=score)
    torch.testing.assert_close(make(cls).loss(routing), by_the_formula(cls, routing), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", TWINS)
@given(seed=seeds, n_sequences=st.integers(1, 3))
def test_a_loss_over_equal_sequences_is_the_mean_of_theirs(cls: type, seed: int, n_sequences: int) -> None:
    logits = random_logits(seed, 5 * n_sequences)
    whole = make(cls).loss(noisy_routing(logits, TOP_K, n_sequences))
    parts = [by_the_formula(cls, noisy_routing(part)) for part in logits.split(5)]
    torch.testing.assert_close(whole, sum(parts) / n_sequences, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", SCOPED)
@pytest.mark.parametrize("scope", ["micro_batch", "batch"])
@given(seed=seeds)
def test_a_loss_over_a_batch_takes_all_its_tokens_as_one(cls: type, scope: str, seed: int) -> None:
    logits = random_logits(seed, 15)
    whole = make(cls, scope=scope).loss(noisy_routing(logits, TOP_K, 3))
    torch.testing.assert_close(whole, by_the_formula(cls, noisy_routing(logits)), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("cls", BALANCING)
def test_layers_collapsed_onto_different_experts_do_not_look_balanced_together(cls: type) -> None:
    # Together the layers use every expert equally; by itself each uses one expert, or one device, alone.
    rule = make(cls, top_k=1, **{"max_devices": 1} if cls is rules.CommunicationLoss else {})
    layers = [noisy_routing(80.0 * torch.eye(N_EXPERTS)[e].expand(20, -1), 1) for e in range(N_EXPERTS)]
    worst = DEVICES if "n_devices" in TWINS[cls].settings else N_EXPERTS
    assert float(sum(rule.loss(routing) for routing in layers) / N_EXPERTS) == pytest.approx(worst * ONE, rel=1e-4)


@pytest.mark.parametrize("cls", [cls for cls in BALANCING if "n_devices" not in TWINS[cls].settings])
def test_a_step_along_a_loss_evens_the_load(cls: type) -> None:
    logits = (random_logits(0, 200) + torch.linspace(0, 2, N_EXPERTS)).requires_grad_()
    make(cls).loss(noisy_routing(logits)).backward()
    pull = logits.grad.sum(dim=0)
    assert pull[-1] > 0 > pull[0]


@pytest.mark.parametrize("cls", TWINS)
def test_the_gradient_reaches_the_centroids_and_equals_a_finite_difference(cls: type) -> None:
    x = torch.randn(10, 5, generator=generator(0), dtype=torch.float64)
    centroids = torch.randn(N_EXPERTS, 5, generator=generator(1), dtype=torch.float64, requires_grad=True)
    rule = make(cls)
    assert torch.autograd.gradcheck(lambda e: rule.loss(noisy_routing(x @ e.T, TOP_K, 2)), (centroids,))


@pytest.mark.parametrize("cls", TWINS)
def test_the_loss_of_a_layer_trains_its_router_and_no_expert(cls: type) -> None:
    rule = cls(coefficient=ONE, **TWINS[cls].settings)
    layer = random_layer(0, width=5, n_routed=N_EXPERTS, top_k=TOP_K, routing=TWINS[cls].routing, balance=(rule,))
    routing = layer(torch.randn(2, 7, 5, generator=generator(0))).routing
    layer.balance[rule.kind].loss(routing).backward()
    assert layer.router.centroids.grad.abs().max() > 1e-4
    assert layer.experts.gate_up.grad is None
