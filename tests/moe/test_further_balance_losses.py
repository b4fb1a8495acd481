"""Balance losses on routings of every form: several pools, tokens with few places, tasks, noise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, routing_of, seeds
from torch import Tensor

from moekit.config import balance as rules
from moekit.config.capacity import ExpertCapacity
from moekit.config.errors import ConfigError
from moekit.config.moe import MoEConfig
from moekit.config.routing import NoisyTopKRouting, ProjectionRouting, TaskRouting, TopKRouting, TwoPoolRouting
from moekit.moe.balance import build_rule
from moekit.moe.balance.load_loss import kth_excluding
from moekit.moe.routing import Routing
from oracle import balance as oracle

ONE = 0.37
POOLS = {"two": ((2, 1), (6, 2)), "three": ((4, 2), (4, 2), (4, 2))}
Formula = Callable[[oracle.Choices, oracle.Scores, oracle.Scores], Tensor]
FORMULAS: dict[type, Formula] = {
    rules.ExpertLoss: lambda choices, scores, _: oracle.expert_loss(choices, scores, ONE),
    rules.SequenceLoss: lambda choices, scores, _: oracle.sequence_loss(scores, len(choices[0]), ONE),
    rules.FirstChoiceLoss: lambda _, scores, __: oracle.first_choice_loss(scores, ONE),
    rules.ImportanceLoss: lambda choices, scores, own: oracle.importance_loss(choices, own, len(scores[0]), ONE),
    rules.VarianceLoss: lambda _, scores, __: oracle.variance_loss(scores, ONE),
    rules.EntropyLoss: lambda _, scores, __: oracle.entropy_loss(scores, ONE),
}


def rule_of(cls: type, routing: Any, n_routed: int, top_k: int, **settings: Any) -> Any:
    if hasattr(cls(), "scope"):
        settings["scope"] = "batch"
    rule = cls(coefficient=ONE, **settings)
    return build_rule(rule, MoEConfig(n_routed=n_routed, top_k=top_k, routing=routing, balance=(rule,)))


def pooled(seed: int, n_tokens: int, pools: tuple[tuple[int, int], ...]) -> tuple[Routing, list[Routing]]:
    """A routing by several pools, each with its softmax and its top-k, and those of the pools by themselves."""
    source, parts, experts, start = generator(seed), [], [], 0
    for size, chosen in pools:
        parts.append(routing_of(torch.randn(n_tokens, size, generator=source, dtype=torch.float64), chosen))
        experts.append(parts[-1].experts + start)
        start += size
    joined = [torch.cat([part[field] for part in parts], dim=-1) for field in (1, 2, 3)]
    return Routing(torch.cat(experts, dim=-1), *joined), parts


def listed(values: Tensor) -> list[list[Tensor]]:
    return [list(token) for token in values]


@pytest.mark.parametrize("cls", FORMULAS)
@pytest.mark.parametrize("form", POOLS)
@given(seed=seeds, n_tokens=st.integers(1, 8))
def test_a_loss_over_several_pools_is_the_mean_of_theirs(cls: type, form: str, seed: int, n_tokens: int) -> None:
    kind = {"two": (TwoPoolRouting(n_common=2), 8, 3), "three": (ProjectionRouting(), 4, 2)}[form]
    whole, parts = pooled(seed, n_tokens, POOLS[form])
    expected = [FORMULAS[cls](part.experts.tolist(), listed(part.scores), listed(part.weights)) for part in parts]
    torch.testing.assert_close(rule_of(cls, *kind).loss(whole), sum(expected) / len(parts), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", [rules.ExpertLoss, rules.ImportanceLoss])
@given(seed=seeds, n_tokens=st.integers(1, 9))
def test_empty_places_and_padding_count_for_nothing(cls: type, seed: int, n_tokens: int) -> None:
    source = generator(seed)
    found = routing_of(torch.randn(n_tokens + 1, 5, generator=source, dtype=torch.float64), 3)
    used = torch.randint(0, 4, (n_tokens + 1, 1), generator=source)
    used[0] = 3
    empty = torch.arange(3) >= used
    mask = torch.rand(n_tokens + 1, generator=source) < 0.7
    mask[0] = True
    routing = found._replace(
        experts=found.experts.masked_fill(empty, -1), weights=found.weights.masked_fill(empty, 0), mask=mask
    )
    choices = [[expert for expert in token if expert >= 0] for token in routing.experts[mask].tolist()]
    expected = FORMULAS[cls](choices, listed(routing.scores[mask]), listed(routing.weights[mask]))
    torch.testing.assert_close(rule_of(cls, TopKRouting(), 5, 3).loss(routing), expected, rtol=1e-6, atol=0)


@given(seed=seeds)
def test_a_device_holds_all_three_matrices_of_its_experts(seed: int) -> None:
    whole, parts = pooled(seed, 6, POOLS["three"])
    f, p, sent = [0.0, 0.0], [torch.tensor(0.0)] * 2, [0, 0]
    for part in parts:
        of_experts = oracle.frequencies(part.experts.tolist(), 4), oracle.probabilities(listed(part.scores))
        for device in range(2):
            own = slice(2 * device, 2 * device + 2)
            f[device] += sum(of_experts[0][own]) / 2 / 3
            p[device] = p[device] + sum(of_experts[1][own]) / 3
    for token in whole.experts.tolist():
        for device in range(2):
            sent[device] += any(expert % 4 // 2 == device for expert in token)
    kind = ProjectionRouting(), 4, 2
    loss = rule_of(rules.DeviceLoss, *kind, n_devices=2).loss(whole)
    torch.testing.assert_close(loss, ONE * (f[0] * p[0] + f[1] * p[1]), rtol=1e-6, atol=0)
    loss = rule_of(rules.CommunicationLoss, *kind, n_devices=2, max_devices=2).loss(whole)
    torch.testing.assert_close(loss, ONE * (sent[0] * p[0] + sent[1] * p[1]) / 6, rtol=1e-6, atol=0)


@given(seed=seeds, n_tokens=st.integers(1, 9))
def test_with_one_expert_a_token_the_loss_of_first_choices_is_the_expert_loss(seed: int, n_tokens: int) -> None:
    routing = routing_of(torch.randn(n_tokens, 5, generator=generator(seed)), 1)
    one, two = (rule_of(cls, TopKRouting(), 5, 1).loss(routing) for cls in (rules.FirstChoiceLoss, rules.ExpertLoss))
    assert torch.equal(one, two)


def test_the_first_choice_counts_even_if_the_bias_took_another() -> None:
    routing = routing_of(torch.randn(9, 5, generator=generator(0)), 2)
    rule = rule_of(rules.FirstChoiceLoss, TopKRouting(), 5, 2)
    assert torch.equal(rule.loss(routing), rule.loss(routing._replace(experts=torch.tensor([[0, 1]]).expand(9, 2))))


def test_the_scale_of_the_weights_does_not_change_their_importance() -> None:
    routing = routing_of(torch.randn(9, 5, generator=generator(0)), 2)
    rule = rule_of(rules.ImportanceLoss, TopKRouting(), 5, 2)
    torch.testing.assert_close(rule.loss(routing._replace(weights=16 * routing.weights)), rule.loss(routing))


@pytest.mark.parametrize("cls", [rules.EntropyLoss, rules.CommonMassLoss, rules.VarianceLoss, rules.FirstChoiceLoss])
def test_experts_out_of_a_tasks_reach_give_no_gradient_and_no_number_that_is_not_finite(cls: type) -> None:
    settings = {"coefficient": ONE, **({"scope": "batch"} if hasattr(cls(), "scope") else {})}
    routing = TaskRouting(n_tasks=2, n_common=2)
    layer = random_layer(0, width=5, n_routed=6, top_k=2, routing=routing, balance=(cls(**settings),))
    x = torch.randn(1, 7, 5, generator=generator(0))
    loss = layer.balance[cls().kind].loss(layer(x, tasks=torch.tensor([0])).routing)
    loss.backward()
    gradient = layer.router.centroids.grad
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[:4].abs().amax() > 1e-4
    assert not gradient[4:].any()


@given(seed=seeds)
def test_in_two_pools_the_common_mass_is_that_of_the_chosen(seed: int) -> None:
    whole, (common, _) = pooled(seed, 6, POOLS["two"])
    expected = ONE * (common.weights.sum(dim=-1) / whole.weights.sum(dim=-1)).mean()
    loss = rule_of(rules.CommonMassLoss, TwoPoolRouting(n_common=2), 8, 3).loss(whole)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_a_token_that_chose_common_experts_alone_is_pushed_away_from_them() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0, 1.0]], requires_grad=True)
    rule_of(rules.CommonMassLoss, TaskRouting(n_common=2), 4, 2).loss(routing_of(logits, 2)).backward()
    assert (logits.grad[0, :2] > 0).all()
    assert (logits.grad[0, 2:] < 0).all()


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.integers(1, 5))
def test_the_kth_best_of_the_others_is_found_with_ties_too(values: list[int], k: int) -> None:
    k = min(k, len(values) - 1)
    expected = [float(sorted(values[:i] + values[i + 1 :], reverse=True)[k - 1]) for i in range(len(values))]
    assert kth_excluding(torch.tensor([values], dtype=torch.float32), k).tolist() == [expected]


def test_the_smooth_load_is_how_often_noise_chooses_an_expert() -> None:
    layer = random_layer(0, width=4, n_routed=8, top_k=2, routing=NoisyTopKRouting()).train()
    routing = layer(torch.randn(1, 4, generator=generator(0)).expand(40_000, -1), generator=generator(1)).routing
    rule = rule_of(rules.LoadLoss, NoisyTopKRouting(), 8, 2)
    often = torch.bincount(routing.experts.flatten(), minlength=8) / 40_000
    torch.testing.assert_close(rule.count(routing) / 40_000, often, rtol=0, atol=0.01)


def test_the_load_loss_trains_the_noise_too() -> None:
    layer = random_layer(0, width=4, n_routed=8, top_k=2, routing=NoisyTopKRouting()).train()
    routing = layer(torch.randn(9, 4, generator=generator(0)), generator=generator(1)).routing
    rule_of(rules.LoadLoss, NoisyTopKRouting(), 8, 2).loss(routing).backward()
    assert layer.router.rule.noise.grad.abs().amax() > 1e-5


def test_where_every_expert_is_chosen_the_load_is_even() -> None:
    layer = random_layer(0, width=4, n_routed=3, top_k=3, routing=NoisyTopKRouting()).train()
    loss = rule_of(rules.LoadLoss, NoisyTopKRouting(), 3, 3).loss(layer(torch.randn(9, 4)).routing)
    assert loss.item() == pytest.approx(ONE)


@pytest.mark.parametrize(("cls", "kind"), [(rules.LoadLoss, "noisy_top_k"), (rules.CommonMassLoss, "task or two_pool")])
def test_a_loss_for_another_kind_of_routing_is_refused(cls: type, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"`balance.{cls().kind}`: needs {kind} routing, not top_k"):
        MoEConfig(balance=(cls(),))


@pytest.mark.parametrize("dropped", ["shared", "next_best"])
def test_importance_is_that_of_the_choice_whatever_a_capacity_turns_away(dropped: str) -> None:
    rule = rules.ImportanceLoss(coefficient=ONE)
    full, free = (
        random_layer(0, width=4, n_routed=4, top_k=2, balance=(rule,), capacity=capacity).train()
        for capacity in (ExpertCapacity(factor=0.5, dropped=dropped), None)
    )
    limited, routing = (layer(torch.randn(20, 4, generator=generator(0))).routing for layer in (full, free))
    assert not torch.equal(limited.weights, routing.weights)
    assert torch.equal(full.balance["importance_loss"].loss(limited), free.balance["importance_loss"].loss(routing))
