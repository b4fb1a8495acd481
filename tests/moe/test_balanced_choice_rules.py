"""Rules whose choice for a token looks at others: BASE, Sinkhorn, expert choice, hybrid, Soft MoE."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, seeds
from torch import Tensor

from moekit.config.routing import (
    BaseRouting,
    ExpertChoiceRouting,
    HybridRouting,
    SinkhornRouting,
    SoftRouting,
)
from moekit.moe.layer import MoE
from moekit.moe.routing import Routing
from moekit.moe.selection import assignment
from moekit.moe.selection.assignment import balanced_assignment
from moekit.moe.selection.sinkhorn import sinkhorn
from moekit.moe.stats import load
from oracle import assignment as twin
from oracle.compare import relative_error

WIDTH = 6
few_tokens, few_experts = st.integers(1, 12), st.integers(1, 5)


class Batch(NamedTuple):
    """Sequences [B S D] of random tokens, some of them padding."""

    x: Tensor
    mask: Tensor | None

    def real(self) -> list[list[int]]:
        """The places of each sequence's real tokens among all tokens."""
        n_sequences, length = self.x.shape[:2]
        rows = range(n_sequences)
        real = torch.ones(n_sequences, length, dtype=torch.bool) if self.mask is None else self.mask
        return [[row * length + place for place in range(length) if real[row, place]] for row in rows]

    def routed(self, layer: MoE) -> Routing:
        return layer(self.x, self.mask).routing


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    source = generator(draw(seeds))
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 7)), WIDTH, generator=source)
    padded = draw(st.booleans())
    return Batch(x, torch.rand(x.shape[:2], generator=source) < 0.6 if padded else None)


def layer_of(routing: Any, seed: int = 0, n_routed: int = 5, top_k: int = 2, **settings: Any) -> MoE:
    sizes = {"width": WIDTH, "expert_width": 4, "n_routed": n_routed, "n_shared": 0, "top_k": top_k}
    return random_layer(seed, routing=routing, **sizes | settings)


def chosen(routing: Routing, tokens: list[int]) -> list[set[int]]:
    return [{expert for expert in row if expert >= 0} for row in routing.experts[tokens].tolist()]


def flat(groups: list[list[int]]) -> list[int]:
    return [token for group in groups for token in group]


def check_weights(routing: Routing) -> None:
    """Chosen experts weigh their score, padding nothing."""
    used = routing.experts >= 0
    expected = routing.scores.gather(-1, routing.experts.clamp_min(0)) * used
    assert torch.equal(routing.weights, expected)
    if routing.mask is not None:
        assert not used[~routing.mask].any()


# BASE


def check_balanced(experts: Tensor, n_experts: int) -> None:
    loads = torch.bincount(experts, minlength=n_experts)
    assert set(loads.tolist()) <= {len(experts) // n_experts, -(-len(experts) // n_experts)}


@given(seeds, few_tokens, few_experts, st.sampled_from(["any", "whole", "one", "two"]), st.sampled_from([0.02, 1e-3]))
def test_an_assignment_is_balanced_and_within_its_bound_of_the_best(
    seed: int, n_tokens: int, n_experts: int, kind: str, accuracy: float
) -> None:
    scores = torch.randn(n_tokens, n_experts, generator=generator(seed))
    if kind == "whole":
        scores = scores.round()
    elif kind != "any":
        scores = scores[torch.arange(n_tokens) % {"one": 1, "two": 2}[kind]]
    experts = balanced_assignment(scores, accuracy)
    check_balanced(experts, n_experts)
    total = float(scores.gather(-1, experts.unsqueeze(-1)).sum())
    epsilon = accuracy * float(scores.max() - scores.min())
    best = twin.largest_balanced_sum(scores.tolist())
    assert best - (n_tokens + n_experts) * epsilon - 1e-4 <= total <= best + 1e-4


@given(seeds, few_tokens, few_experts)
def test_of_whole_scores_a_fine_assignment_is_the_best(seed: int, n_tokens: int, n_experts: int) -> None:
    scores = torch.randint(0, 9, (n_tokens, n_experts), generator=generator(seed)).float()
    # The sum is whole, and within less than one of the best.
    experts = balanced_assignment(scores, 0.99 / (8 * (n_tokens + n_experts)))
    assert float(scores.gather(-1, experts.unsqueeze(-1)).sum()) == twin.largest_balanced_sum(scores.tolist())


@pytest.mark.parametrize("rounds", [0, 1, 3, 10])
@pytest.mark.parametrize("n_tokens", [3, 40, 64, 100])
def test_an_auction_that_ends_early_is_balanced_all_the_same(monkeypatch, rounds: int, n_tokens: int) -> None:
    monkeypatch.setattr(assignment, "ROUNDS", rounds)
    for seed in range(5):
        scores = torch.randn(n_tokens, 8, generator=generator(seed)) + torch.linspace(0, 3, 8)
        check_balanced(balanced_assignment(scores), 8)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_numbers_without_meaning_end_in_some_balanced_assignment(value: float) -> None:
    scores = torch.randn(50, 8, generator=generator(0))
    scores[::3] = value
    check_balanced(balanced_assignment(scores), 8)


def test_the_same_scores_lead_to_the_same_assignment() -> None:
    scores = torch.randn(500, 16, generator=generator(0)).round(decimals=1)
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores.clone()))


@given(batches())
def test_base_shares_out_real_tokens_in_training(batch: Batch) -> None:
    layer = layer_of(BaseRouting(), top_k=1).train()
    routing, real = batch.routed(layer), flat(batch.real())
    check_weights(routing)
    assert torch.equal(routing.scores, routing.logits.sigmoid())
    check_balanced(routing.experts[real].flatten(), 5)
    alone = layer(batch.x.flatten(0, 1)[real]).routing
    assert torch.equal(routing.experts[real], alone.experts)


def test_base_takes_the_best_expert_outside_training() -> None:
    routing = Batch(torch.randn(2, 50, WIDTH, generator=generator(0)), None).routed(layer_of(BaseRouting(), top_k=1))
    assert not torch.equal(routing.experts.squeeze(-1), routing.logits.argmax(dim=-1))
    layer = layer_of(BaseRouting(), top_k=1).eval()
    routing = Batch(torch.randn(2, 50, WIDTH, generator=generator(0)), None).routed(layer)
    assert torch.equal(routing.experts.squeeze(-1), routing.logits.argmax(dim=-1))


# Sinkhorn


@given(seeds, few_tokens, st.integers(1, 6))
def test_sinkhorn_is_megatrons_iteration(seed: int, n_tokens: int, n_experts: int) -> None:
    logits = torch.randn(n_tokens, n_experts, generator=generator(seed))
    expected = torch.tensor(twin.sinkhorn(logits.tolist(), 100))
    assert relative_error(sinkhorn(logits, 1e-7), expected) <= 1e-4


@given(batches(), st.integers(1, 3))
def test_sinkhorn_chooses_by_balanced_scores_and_weighs_by_its_own(batch: Batch, top_k: int) -> None:
    layer = layer_of(SinkhornRouting(tolerance=1e-6), top_k=top_k).train()
    routing, real = batch.routed(layer), flat(batch.real())
    scores = routing.logits.sigmoid() if top_k == 1 else routing.logits.softmax(dim=-1)
    assert torch.equal(routing.scores, scores)
    check_weights(routing)
    if not real:
        return
    balanced = twin.sinkhorn(routing.logits[real].tolist(), 200)
    for token, experts in zip(balanced, chosen(routing, real), strict=True):
        ordered = sorted(token, reverse=True)
        if ordered[top_k - 1] > 1.001 * ordered[top_k]:
            assert experts == set(twin.best(token, top_k))


def test_sinkhorn_takes_the_best_scores_outside_training() -> None:
    layer = layer_of(SinkhornRouting()).eval()
    routing = Batch(torch.randn(2, 50, WIDTH, generator=generator(0)), None).routed(layer)
    assert torch.equal(routing.experts, routing.logits.topk(2, dim=-1).indices)


@pytest.mark.parametrize("size", [1.0, 100.0, 1e4, 1e30])
def test_sinkhorn_of_large_logits_overflows_nowhere(size: float) -> None:
    logits = size * torch.randn(64, 8, generator=generator(0))
    balanced = sinkhorn(logits, 1e-4)
    assert balanced.isfinite().all() and (balanced >= 0).all()


def test_sinkhorn_gives_an_expert_nobody_wants_its_share() -> None:
    logits = torch.randn(400, 4, generator=generator(0))
    logits[:, 2] -= 500
    balanced = sinkhorn(logits, 1e-6)
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((4,), 0.25), rtol=1e-3, atol=0)
    assert torch.bincount(balanced.argmax(dim=-1), minlength=4).min() > 50


# Expert choice

scopes = st.sampled_from(["batch", "sequence"])


def groups_of(batch: Batch, scope: str) -> list[list[int]]:
    return [flat(batch.real())] if scope == "batch" else batch.real()


@given(batches(), scopes, st.integers(1, 5), st.booleans())
def test_each_expert_takes_its_best_tokens(batch: Batch, scope: Any, top_k: int, training: bool) -> None:
    layer = layer_of(ExpertChoiceRouting(scope=scope), top_k=top_k).train(training)
    routing = batch.routed(layer)
    check_weights(routing)
    assert torch.equal(routing.scores, routing.logits.softmax(dim=-1))
    for group in groups_of(batch, scope):
        assert chosen(routing, group) == twin.expert_choice(routing.scores[group].tolist(), top_k)


@given(batches(), st.integers(1, 5))
def test_expert_choice_is_perfectly_balanced(batch: Batch, top_k: int) -> None:
    counts = load(batch.routed(layer_of(ExpertChoiceRouting(), top_k=top_k)))
    assert set(counts.tolist()) == {-(-len(flat(batch.real())) * top_k // 5)}


@given(st.lists(st.lists(batches(), min_size=1, max_size=2), min_size=1, max_size=3), scopes)
def test_the_threshold_follows_the_lowest_scores_taken(steps: list[list[Batch]], scope: Any) -> None:
    layer = layer_of(ExpertChoiceRouting(scope=scope, decay=0.75)).train()
    expected: list[float] | None = None
    for step in steps:
        routings = [batch.routed(layer) for batch in step]
        groups = [
            (routing, group)
            for batch, routing in zip(step, routings, strict=True)
            for group in groups_of(batch, scope)
            if group
        ]
        if groups:
            lowest = [twin.lowest_taken(routing.scores[group].tolist(), 2) for routing, group in groups]
            n_tokens = sum(len(group) for _, group in groups)
            weighted = [
                sum(len(group) * low[e] for (_, group), low in zip(groups, lowest, strict=True)) for e in range(5)
            ]
            found = [value / n_tokens for value in weighted]
            both = zip(expected or found, found, strict=True)
            expected = [0.75 * old + 0.25 * new for old, new in both]
        seen = [layer.observe(routing) for routing in routings]
        layer.after_step(sum(seen[1:], seen[0]))
    reference = torch.tensor(expected or [1.0] * 5)
    torch.testing.assert_close(layer.router.rule.threshold.data, reference, rtol=1e-5, atol=1e-7)


@given(seeds, st.integers(1, 3))
def test_by_threshold_each_token_goes_by_itself(seed: int, top_k: int) -> None:
    layer = layer_of(ExpertChoiceRouting(decode="threshold"), seed, n_routed=9, top_k=top_k).eval()
    thresholds = 0.3 * torch.rand(9, generator=generator(seed))
    layer.router.rule.threshold.data.copy_(thresholds)
    routing = layer(torch.randn(2, 10, WIDTH, generator=generator(seed))).routing
    check_weights(routing)
    expected = [twin.above_thresholds(token, thresholds.tolist(), 4 * top_k) for token in routing.scores.tolist()]
    assert chosen(routing, list(range(20))) == expected


def test_on_the_tokens_it_was_found_on_the_threshold_repeats_the_choice() -> None:
    layer = layer_of(ExpertChoiceRouting(decode="threshold", decay=0.0)).train()
    batch = Batch(torch.randn(1, 60, WIDTH, generator=generator(0)), None)
    for _ in range(2):
        trained = batch.routed(layer)
        layer.after_step(layer.observe(trained))
    # The average is rounded twice; nothing may fall below it for that.
    layer.router.rule.threshold.data.mul_(1 - 1e-6)
    decoded = batch.routed(layer.eval())
    best = trained.scores.argmax(dim=-1).tolist()
    expected = [one | {first} for one, first in zip(chosen(trained, list(range(60))), best, strict=True)]
    assert chosen(decoded, list(range(60))) == expected


def test_before_anything_was_observed_a_token_gets_its_best_expert() -> None:
    layer = layer_of(ExpertChoiceRouting(decode="threshold")).eval()
    routing = Batch(torch.randn(1, 20, WIDTH, generator=generator(0)), None).routed(layer)
    assert torch.equal(routing.experts, routing.scores.argmax(dim=-1, keepdim=True))


def test_a_model_trained_without_a_decoding_rule_can_be_given_one() -> None:
    layer, other = layer_of(ExpertChoiceRouting()), layer_of(ExpertChoiceRouting(decode="threshold"), 1)
    batch = Batch(torch.randn(1, 40, WIDTH, generator=generator(0)), None)
    layer.after_step(layer.observe(batch.routed(layer)))
    other.load_state_dict(layer.state_dict())
    assert 1.5 < load(batch.routed(other.eval())).sum() / 40 < 2.5


# Hybrid


@given(batches(), seeds, st.integers(1, 5))
def test_experts_above_the_threshold_choose_and_the_others_are_chosen(batch: Batch, seed: int, top_k: int) -> None:
    layer = layer_of(HybridRouting(threshold=1.25), top_k=top_k).train()
    loads = 2 * torch.rand(5, generator=generator(seed)) + 0.25
    layer.router.rule.load.data.copy_(loads)
    routing, real = batch.routed(layer), flat(batch.real())
    assert torch.equal(routing.weights > 0, routing.experts >= 0)
    expected = twin.hybrid(routing.scores[real].tolist(), top_k, (loads > 1.25).tolist()) if real else []
    assert chosen(routing, real) == expected


@given(seeds)
def test_outside_training_an_expert_above_it_takes_what_reaches_its_score(seed: int) -> None:
    layer, source = layer_of(HybridRouting(), seed).eval(), generator(seed)
    rule = layer.router.rule
    rule.load.data.copy_(2 * torch.rand(5, generator=source) + 0.25)
    rule.threshold.data.copy_(0.5 * torch.rand(5, generator=source))
    routing = layer(torch.randn(2, 9, WIDTH, generator=source)).routing
    hot, scores = (rule.load > 1.25).tolist(), routing.scores.tolist()
    for token, asked, experts in zip(
        scores, twin.token_choice(scores, 2), chosen(routing, list(range(18))), strict=True
    ):
        takes = [token[e] >= float(rule.threshold[e]) if hot[e] else e in asked for e in range(5)]
        assert experts == {e for e in range(5) if takes[e]}


@given(st.lists(batches(), min_size=1, max_size=3))
def test_the_running_load_follows_what_tokens_ask_for(steps: list[Batch]) -> None:
    layer = layer_of(HybridRouting(decay=0.75)).train()
    loads, thresholds = [1.0] * 5, None
    for batch in steps:
        routing, real = batch.routed(layer), flat(batch.real())
        layer.after_step(layer.observe(routing))
        if real:
            scores = routing.scores[real].tolist()
            wanted, lowest = twin.demand(scores, 2), twin.lowest_taken(scores, 2)
            loads = [0.75 * old + 0.25 * new for old, new in zip(loads, wanted, strict=True)]
            both = zip(thresholds or lowest, lowest, strict=True)
            thresholds = [0.75 * old + 0.25 * new for old, new in both]
    rule = layer.router.rule
    torch.testing.assert_close(rule.load.data, torch.tensor(loads), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rule.threshold.data, torch.tensor(thresholds or [1.0] * 5), rtol=1e-5, atol=1e-6)


def test_an_expert_that_everyone_wants_comes_to_choose_and_keeps_choosing() -> None:
    layer = layer_of(HybridRouting(decay=0.5), top_k=1).train()
    x = torch.randn(1, 100, WIDTH, generator=generator(0)).abs()
    with torch.no_grad():
        layer.router.centroids[3] = 1.0
    counts = []
    for _ in range(12):
        routing = layer(x).routing
        counts.append(load(routing)[3].item())
        layer.after_step(layer.observe(routing))
    assert counts[0] > 50
    assert counts[-1] == 20
    assert layer.router.rule.load[3] > 2.5
    assert all(later <= earlier for earlier, later in pairwise(counts))


# Soft MoE


@given(batches(), seeds, st.integers(1, 3), st.integers(1, 3))
def test_soft_is_the_papers_mixture(batch: Batch, seed: int, slots: int, n_experts: int) -> None:
    layer = layer_of(SoftRouting(slots=slots), seed, n_routed=n_experts, top_k=1).double()
    x = batch.x.double().requires_grad_()
    y = layer(x, batch.mask).y.flatten(0, 1)
    phi, scale = layer.router.centroids, layer.router.rule.scale
    parameters = [x, phi, scale, layer.experts.gate_up, layer.experts.down]
    groups = [group for group in batch.real() if group]
    if not groups:
        assert y.isfinite().all()
        return
    flat_x = x.flatten(0, 1)
    rows = [twin.soft_mixture(flat_x[group], phi, scale, layer.experts.gate_up, layer.experts.down) for group in groups]
    expected, found = torch.cat(rows), y[flat(groups)]
    assert relative_error(found, expected) <= 1e-5
    target = torch.randn(expected.shape, generator=generator(seed), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * target).sum(), parameters)
    got = torch.autograd.grad((found * target).sum(), parameters)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(max(w.abs().max() for w in wanted)))


def test_a_soft_tokens_weights_sum_to_one_over_all_experts() -> None:
    routing = Batch(torch.randn(2, 9, WIDTH, generator=generator(0)), None).routed(layer_of(SoftRouting(slots=3)))
    assert routing.logits.shape == (18, 15)
    assert routing.experts.tolist() == [list(range(5))] * 18
    torch.testing.assert_close(routing.weights.sum(dim=-1), torch.ones(18))
    assert torch.equal(routing.weights, routing.scores)


def test_soft_starts_at_a_scale_of_one_and_its_logits_do_not_grow_with_the_tokens() -> None:
    layer = MoE(layer_of(SoftRouting()).config)
    assert layer.router.rule.scale.item() == 1.0
    x = torch.randn(1, 9, WIDTH, generator=generator(0))
    one, other = layer(x).routing.logits, layer(1000 * x).routing.logits
    torch.testing.assert_close(one, other)
    assert one.abs().max() <= 1
