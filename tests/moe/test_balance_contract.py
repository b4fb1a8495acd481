"""What every balancing rule promises. A rule of the configuration is tested here before its author writes a test."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, routing_of, seeds
from torch import Tensor

from moekit.config.balance import BalanceRule as BalanceConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import Routing as RoutingConfig
from moekit.config.routing import TopKRouting
from moekit.moe.balance import build_rule, selection_bias, selection_factor
from moekit.moe.balance.rule import BalanceRule, StepCount
from moekit.moe.routing import Drawn, Routing

N_EXPERTS, TOP_K = 8, 2
SETTINGS = {"n_devices": 4, "max_devices": 2}
"""What a rule is tested with where it has such a field; all else is as its author chose."""


class Case(NamedTuple):
    cls: type
    settings: dict[str, Any]

    def rule(self) -> BalanceRule:
        rule = self.cls(**self.settings)
        made_for = {cls().kind: cls for cls in get_args(RoutingConfig)}
        routing = made_for[rule.needs_kind[0]]() if rule.needs_kind else TopKRouting()
        return build_rule(rule, MoEConfig(n_routed=N_EXPERTS, top_k=TOP_K, routing=routing, balance=(rule,)))

    def coefficient(self) -> float | None:
        return getattr(self.cls(**self.settings), "coefficient", None)

    def name(self) -> str:
        return "-".join([self.cls.__name__, *map(str, self.settings.values())])


def variants(cls: type) -> list[Case]:
    """The rule as its author set it, but once for every choice of a setting that offers several."""
    hints, names = get_type_hints(cls), {field.name for field in dataclasses.fields(cls)}
    settings = {name: value for name, value in SETTINGS.items() if name in names}
    choosing = [name for name in names if name != "kind" and get_origin(hints[name]) is Literal]
    choices = [{name: choice} for name in choosing for choice in get_args(hints[name])]
    return [Case(cls, settings | choice) for choice in choices or [{}]]


CASES = [case for cls in get_args(BalanceConfig) for case in variants(cls)]
WITH_LOSS = [case for case in CASES if case.coefficient() is not None]
BALANCING = [case for case in WITH_LOSS if case.cls.balances]
every_rule = pytest.mark.parametrize("case", CASES, ids=Case.name)
every_loss = pytest.mark.parametrize("case", WITH_LOSS, ids=Case.name)
score = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


class Batch(NamedTuple):
    """Logits [B S E] and which tokens are real [B S]."""

    logits: Tensor
    mask: Tensor


def random_batch(seed: int, n_sequences: int, length: int) -> Batch:
    source = generator(seed)
    logits = torch.randn(n_sequences, length, N_EXPERTS, generator=source, dtype=torch.float64)
    starts = torch.randint(0, length, (n_sequences, 1), generator=source)
    return Batch(logits, torch.arange(length) >= starts)


def routed(batch: Batch, **settings: Any) -> Routing:
    """The routing, with noise that depends on the token alone."""
    logits, mask = batch
    routing = routing_of(logits.flatten(0, 1), TOP_K, len(logits), mask.flatten(), **settings)
    mean = routing.logits + 0.5 * routing.logits.sin()
    return routing._replace(drawn=Drawn(mean, F.softplus(routing.logits), routing.logits))


def loss_and_gradient(rule: BalanceRule, batch: Batch, step: StepCount | None = None) -> tuple[Tensor, Tensor]:
    logits = batch.logits.clone().requires_grad_()
    loss = rule.loss(routed(batch._replace(logits=logits)), step)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@every_rule
def test_a_bias_is_none_or_a_float32_number_for_each_expert_starting_at_zero(case: Case) -> None:
    bias = case.rule().bias()
    assert bias is None or (bias.dtype == torch.float32 and bias.tolist() == [0.0] * N_EXPERTS)


@every_rule
def test_a_factor_is_none_or_a_float32_number_for_each_expert_starting_at_one(case: Case) -> None:
    factor = case.rule().factor()
    assert factor is None or (factor.dtype == torch.float32 and factor.tolist() == [1.0] * N_EXPERTS)


@every_rule
def test_a_rule_offers_a_loss_exactly_if_it_has_a_coefficient(case: Case) -> None:
    loss = case.rule().loss(routed(random_batch(0, 2, 5)))
    assert (loss is None) == (case.coefficient() is None)


@every_loss
@score
@given(seed=seeds)
def test_a_loss_is_one_finite_number_with_a_finite_gradient(case: Case, score: str, seed: int) -> None:
    batch = random_batch(seed, 3, 5)
    logits = batch.logits.float().requires_grad_()
    loss = case.rule().loss(routed(batch._replace(logits=logits), score=score))
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("case", BALANCING, ids=Case.name)
def test_a_loss_equals_its_coefficient_at_perfect_balance(case: Case) -> None:
    # Token t prefers experts t and t + 4, on two devices; every expert, and every device, is used equally often.
    preferences = torch.tensor([3.0, 0.0, 0.1, 0.2, 3.0, 0.3, 0.4, 0.5], dtype=torch.float64)
    logits = torch.stack([preferences.roll(t) for t in range(N_EXPERTS)])
    batch = Batch(logits.expand(2, -1, -1), torch.ones(2, N_EXPERTS, dtype=torch.bool))
    assert float(case.rule().loss(routed(batch))) == pytest.approx(case.coefficient(), rel=1e-6)


@every_loss
@given(seed=seeds)
def test_padding_changes_no_loss_and_gets_no_gradient(case: Case, seed: int) -> None:
    rule, batch = case.rule(), random_batch(seed, 3, 5)
    noise = torch.randn(batch.logits.shape, generator=generator(seed + 1), dtype=torch.float64)
    other = batch._replace(logits=torch.where(batch.mask.unsqueeze(-1), batch.logits, noise))
    (one, gradient), (two, _) = loss_and_gradient(rule, batch), loss_and_gradient(rule, other)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=0)
    assert not gradient[~batch.mask].any()


@every_loss
@given(seed=seeds, n_padding=st.integers(1, 3))
def test_longer_padding_changes_no_loss(case: Case, seed: int, n_padding: int) -> None:
    rule, batch = case.rule(), random_batch(seed, 3, 5)
    longer = Batch(
        torch.cat([torch.randn(3, n_padding, N_EXPERTS, dtype=torch.float64), batch.logits], dim=1),
        torch.cat([torch.zeros(3, n_padding, dtype=torch.bool), batch.mask], dim=1),
    )
    (one, gradient), (two, longer_gradient) = loss_and_gradient(rule, batch), loss_and_gradient(rule, longer)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, longer_gradient[:, n_padding:], rtol=1e-6, atol=1e-12)


@every_loss
def test_a_sequence_of_nothing_but_padding_changes_no_loss(case: Case) -> None:
    rule, batch = case.rule(), random_batch(0, 3, 5)
    more = Batch(
        torch.cat([batch.logits, torch.zeros(1, 5, N_EXPERTS, dtype=torch.float64)]),
        torch.cat([batch.mask, torch.zeros(1, 5, dtype=torch.bool)]),
    )
    torch.testing.assert_close(rule.loss(routed(batch)), rule.loss(routed(more)), rtol=1e-9, atol=0)


@every_loss
@given(seed=seeds)
def test_the_order_of_sequences_changes_no_loss(case: Case, seed: int) -> None:
    rule, batch = case.rule(), random_batch(seed, 4, 5)
    order = torch.randperm(4, generator=generator(seed))
    (one, gradient), (two, permuted) = (
        loss_and_gradient(rule, batch),
        loss_and_gradient(rule, Batch(batch.logits[order], batch.mask[order])),
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient[order], permuted, rtol=1e-6, atol=1e-12)


@every_loss
@given(seed=seeds, size=st.integers(1, 4))
def test_micro_batches_add_up_to_the_batch_in_value_and_gradient(case: Case, seed: int, size: int) -> None:
    if case.settings.get("scope") == "micro_batch":
        size = 4
    rule, batch = case.rule(), random_batch(seed, 4, 5)
    parts = [Batch(*part) for part in zip(batch.logits.split(size), batch.mask.split(size), strict=True)]
    n_real = int(batch.mask.sum())
    counts = [rule.count(routed(part)) for part in parts] if rule.counts_step else []
    step = StepCount(torch.stack(counts).sum(dim=0), n_real) if counts else None
    value, gradients = torch.zeros((), dtype=torch.float64), []
    for part in parts:
        share = int(part.mask.sum()) / n_real
        loss, gradient = loss_and_gradient(rule, part, step)
        value = value + share * loss
        gradients.append(share * gradient)
    whole, gradient = loss_and_gradient(rule, batch)
    torch.testing.assert_close(value, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-5, atol=1e-10)


@every_rule
def test_a_rule_counts_the_step_exactly_if_its_scope_is_the_batch(case: Case) -> None:
    assert case.rule().counts_step == (case.settings.get("scope") == "batch")


@every_rule
@pytest.mark.parametrize("n_sequences", [1, 3])
def test_a_batch_without_tokens_adds_nothing(case: Case, n_sequences: int) -> None:
    rule = case.rule()
    logits = torch.zeros(0, N_EXPERTS, requires_grad=True)
    routing = routing_of(logits, TOP_K, n_sequences)._replace(drawn=Drawn(logits, logits, logits))
    assert not rule.counts_step or not rule.count(routing).any()
    loss = rule.loss(routing)
    if loss is not None:
        loss.backward()
        assert loss.item() == 0.0


@every_rule
def test_dropped_and_empty_places_are_ordinary(case: Case) -> None:
    rule, routing = case.rule(), routed(random_batch(0, 2, 5))
    dropped = routing._replace(served=torch.full_like(routing.experts, -1))
    empty = routing._replace(experts=torch.full_like(routing.experts, -1))
    loss = rule.loss(routing)
    if loss is not None:
        assert torch.equal(loss, rule.loss(dropped))
        assert rule.loss(empty).isfinite()


@every_rule
def test_a_loss_or_a_count_changes_no_state(case: Case) -> None:
    rule, routing = case.rule(), routed(random_batch(0, 2, 5))
    before = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
    rule.loss(routing)
    if rule.counts_step:
        rule.count(routing)
    assert all(torch.equal(tensor, rule.state_dict()[name]) for name, tensor in before.items())


@every_rule
@pytest.mark.parametrize("load", [0, 5])
def test_an_even_load_moves_no_state(case: Case, load: int) -> None:
    rule = case.rule()
    before = {name: tensor.clone() for name, tensor in rule.state_dict().items()}
    rule.after_step(torch.full((N_EXPERTS,), load))
    assert all(torch.equal(tensor, rule.state_dict()[name]) for name, tensor in before.items())


@every_rule
def test_the_state_of_a_rule_can_be_saved_and_read_back(case: Case) -> None:
    rule, other = case.rule(), case.rule()
    rule.after_step(torch.arange(N_EXPERTS))
    other.load_state_dict(rule.state_dict())
    for steered in (selection_bias, selection_factor):
        one, two = (steered(torch.nn.ModuleDict({"rule": r})) for r in (rule, other))
        assert (one is None and two is None) or torch.equal(one, two)
