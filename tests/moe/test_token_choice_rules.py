"""Every rule by which each token chooses for itself is the rule of its paper, token by token."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, randomise, seeds
from torch import Tensor

import oracle.selection as twin
from moekit.config.moe import MoEConfig
from moekit.config.routing import (
    GShardRouting,
    NoisyTopKRouting,
    NullRouting,
    Routing,
    SwitchRouting,
    TopPRouting,
    TwoPoolRouting,
)
from moekit.moe.selection import Selection, SelectionRule, Tokens, build_selection
from oracle.gates import mixtral_gates
from oracle.selection import Chosen

WIDTH = 5
Twin = Callable[[int, list[Tensor], list[float]], Chosen]


class Shape(NamedTuple):
    """Sizes and oddities of a router's input; `strength` is that of the selection bias."""

    seed: int
    n_tokens: int
    n_experts: int
    top_k: int
    sharpness: float
    strength: float
    same: bool
    training: bool


@st.composite
def shapes(draw: st.DrawFn, least: int = 1, top_k: int | None = None) -> Shape:
    n_experts = draw(st.integers(least, 9))
    return Shape(
        seed=draw(seeds),
        n_tokens=draw(st.sampled_from([0, 1, 2, 7])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)) if top_k is None else top_k,
        sharpness=draw(st.sampled_from([0.1, 1.0, 6.0])),
        strength=draw(st.sampled_from([0.0, 0.1, 10.0])),
        same=draw(st.booleans()),
        training=draw(st.booleans()),
    )


def build(routing: Routing, shape: Shape) -> SelectionRule:
    config = MoEConfig(width=WIDTH, n_routed=shape.n_experts, top_k=shape.top_k, routing=routing)
    rule = build_selection(config)
    randomise(rule, shape.seed)
    return rule.train(shape.training)


class Given(NamedTuple):
    """Tokens with their logits [T L], in float64 so that no rounding decides between two experts."""

    tokens: Tokens
    logits: Tensor


def given_of(shape: Shape, n_logits: int | None = None) -> Given:
    source = generator(shape.seed)
    x = torch.randn(shape.n_tokens, WIDTH, generator=source)
    logits = shape.sharpness * torch.randn(
        shape.n_tokens, n_logits or shape.n_experts, generator=source, dtype=torch.float64
    )
    if shape.same and shape.n_tokens:
        x, logits = x[:1].repeat(shape.n_tokens, 1), logits[:1].repeat(shape.n_tokens, 1)
    bias = shape.strength * torch.randn(shape.n_experts, generator=source)
    return Given(Tokens(x, bias, generator=generator(7)), logits.requires_grad_())


def assert_agrees(found: Selection, given_: Given, token: Twin, inputs: tuple[Tensor, ...] = ()) -> None:
    """The same experts in the same places with the same weights, and the same gradients of these."""
    assert given_.tokens.bias is not None
    expected = [token(t, list(row), given_.tokens.bias.tolist()) for t, row in enumerate(given_.logits)]
    value = torch.randn(found.scores.shape, generator=generator(1), dtype=torch.float64)
    ours, theirs = given_.logits.sum() * 0, given_.logits.sum() * 0
    for t, (experts, weights, chosen) in enumerate(zip(found.experts.tolist(), found.weights, expected, strict=True)):
        assert experts == list(chosen) + [-1] * (len(experts) - len(chosen))
        for place, (i, weight) in enumerate(chosen.items()):
            torch.testing.assert_close(weights[place], weight, rtol=1e-5, atol=1e-9)
            ours, theirs = ours + value[t, i] * weights[place], theirs + value[t, i] * weight
        assert not weights[len(chosen) :].any()
    leaves = (given_.logits, *inputs)
    one = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
    two = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@given(shapes())
def test_noisy_top_k_is_the_papers(shape: Shape) -> None:
    rule, given_ = build(NoisyTopKRouting(), shape), given_of(shape)
    found = rule.select(given_.logits, given_.tokens)
    draws = torch.randn(given_.logits.shape, generator=generator(7), dtype=torch.float64)
    draws = (draws if shape.training else 0 * draws).tolist()

    def token(t: int, logits: list[Tensor], bias: list[float]) -> Chosen:
        noise = [given_.tokens.x[t] @ row for row in rule.noise]
        return twin.noisy_top_k(twin.noisy_logits(logits, noise, draws[t]), bias, shape.top_k)

    assert_agrees(found, given_, token, (rule.noise,))


@given(shapes(top_k=1))
def test_switch_is_the_papers(shape: Shape) -> None:
    given_ = given_of(shape)
    found = build(SwitchRouting(), shape).select(given_.logits, given_.tokens)
    assert_agrees(found, given_, lambda _, logits, bias: twin.switch(logits, bias))


@given(shapes(least=2, top_k=2))
def test_gshard_is_the_papers(shape: Shape) -> None:
    given_ = given_of(shape)
    found = build(GShardRouting(), shape).select(given_.logits, given_.tokens)
    draws = torch.rand(shape.n_tokens, generator=generator(7)).tolist()
    draws = draws if shape.training else [None] * shape.n_tokens
    assert_agrees(found, given_, lambda t, logits, bias: twin.gshard(logits, bias, draws[t]))


@given(shapes(), st.sampled_from([0.05, 0.4, 0.9, 0.999]), st.booleans())
def test_top_p_is_the_papers(shape: Shape, p: float, renormalise: bool) -> None:
    given_ = given_of(shape)
    found = build(TopPRouting(p=p, renormalise=renormalise), shape).select(given_.logits, given_.tokens)
    assert_agrees(found, given_, lambda _, logits, bias: twin.top_p(logits, bias, p, shape.top_k, renormalise))


@given(shapes(), st.integers(1, 5), st.booleans())
def test_null_experts_are_chosen_and_left_out(shape: Shape, n_null: int, renormalise: bool) -> None:
    given_ = given_of(shape, shape.n_experts + n_null)
    found = build(NullRouting(n_null=n_null, renormalise=renormalise), shape).select(given_.logits, given_.tokens)
    n_real, top_k = shape.n_experts, shape.top_k
    assert_agrees(found, given_, lambda _, logits, bias: twin.null(logits, bias, n_real, top_k, renormalise))
    torch.testing.assert_close(found.scores, given_.logits.softmax(dim=-1)[:, :n_real])


@given(shapes(least=2, top_k=2), st.booleans(), st.data())
def test_two_pools_choose_as_if_each_were_alone(shape: Shape, renormalise: bool, data: st.DataObject) -> None:
    n_common = data.draw(st.integers(1, shape.n_experts - 1))
    takes = data.draw(st.integers(1, n_common)), data.draw(st.integers(1, shape.n_experts - n_common))
    routing = TwoPoolRouting(n_common=n_common, top_k_common=takes[0], renormalise=renormalise)
    given_ = given_of(shape)
    found = build(routing, shape._replace(top_k=sum(takes))).select(given_.logits, given_.tokens)
    assert_agrees(found, given_, lambda _, logits, bias: twin.two_pool(logits, bias, n_common, takes, renormalise))
    pools = [pool.softmax(dim=-1) for pool in given_.logits.split([n_common, shape.n_experts - n_common], dim=-1)]
    torch.testing.assert_close(found.scores, torch.cat(pools, dim=-1))


ORDINARY = Shape(3, 40, 8, 3, 1.0, 0.0, same=False, training=True)


def test_noise_starts_with_a_deviation_of_log_two_and_leaves_the_logits_clean() -> None:
    rule, given_ = build(NoisyTopKRouting(), ORDINARY), given_of(ORDINARY)
    rule.start()
    for training in (True, False):
        found = rule.train(training).select(given_.logits, given_.tokens)
        assert found.drawn is not None
        assert torch.equal(found.drawn.mean, given_.logits)
        torch.testing.assert_close(found.drawn.deviation, torch.full((40, 8), math.log(2)))
        assert training != torch.equal(found.scores, given_.logits.softmax(dim=-1))


def test_without_noise_noisy_top_k_is_mixtrals() -> None:
    rule, given_ = build(NoisyTopKRouting(), ORDINARY).eval(), given_of(ORDINARY)
    found = rule.select(given_.logits, given_.tokens)
    dense = torch.zeros_like(found.scores).scatter(-1, found.experts, found.weights)
    expected = torch.stack([torch.stack(mixtral_gates(list(row), 3)) for row in given_.logits])
    torch.testing.assert_close(dense, expected)


def test_jitter_reaches_the_router_alone_and_only_in_training() -> None:
    rule = build(SwitchRouting(jitter=0.2), ORDINARY._replace(top_k=1))
    centroids = torch.randn(8, WIDTH, generator=generator(1))
    x = torch.randn(40, WIDTH, generator=generator(2))
    tokens, before = Tokens(x, generator=generator(7)), x.clone()
    factors = torch.empty_like(x).uniform_(0.8, 1.2, generator=generator(7))
    torch.testing.assert_close(rule.logits(tokens, centroids), (x * factors) @ centroids.T)
    assert torch.equal(x, before)
    assert torch.equal(rule.eval().logits(tokens, centroids), x @ centroids.T)


def test_gshard_keeps_a_second_expert_as_good_as_the_first_always_and_a_hopeless_one_never() -> None:
    rule = build(GShardRouting(), ORDINARY._replace(top_k=2))
    logits = torch.tensor([[0.0, 0.0], [200.0, 0.0]]).repeat_interleave(500, dim=0)
    found = rule.select(logits, Tokens(torch.zeros(1000, WIDTH), generator=generator(7)))
    assert (found.experts[:500] >= 0).all()
    assert (found.experts[500:] == torch.tensor([0, -1])).all()
    assert (found.weights[500:] == torch.tensor([1.0, 0.0])).all()


@pytest.mark.parametrize(("p", "top_k", "taken"), [(0.5, 4, 2), (0.5001, 4, 3), (0.25, 4, 1), (1.0, 4, 4), (0.9, 2, 2)])
def test_top_p_stops_where_the_sum_reaches_p_and_at_top_k(p: float, top_k: int, taken: int) -> None:
    shape = ORDINARY._replace(n_experts=4, top_k=top_k)
    found = build(TopPRouting(p=p), shape).select(torch.zeros(1, 4), Tokens(torch.zeros(1, WIDTH)))
    assert (found.experts >= 0).tolist() == [[place < taken for place in range(top_k)]]


def test_a_sure_token_takes_one_expert_by_top_p_and_a_doubtful_one_more() -> None:
    rule = build(TopPRouting(p=0.4), ORDINARY._replace(n_experts=16, top_k=16))
    logits = torch.zeros(2, 16)
    logits[0, 9] = 10.0
    found = rule.select(logits, Tokens(torch.zeros(2, WIDTH)))
    assert (found.experts >= 0).sum(dim=-1).tolist() == [1, 7]
    assert found.experts[0, 0] == 9


def null_layer(**settings: Any) -> tuple[Any, Tensor]:
    """A layer all of whose tokens find its null expert better than every other."""
    layer = random_layer(0, width=WIDTH, n_routed=4, routing=NullRouting(), **settings).eval()
    x = torch.rand(6, WIDTH, generator=generator(0))
    with torch.no_grad():
        layer.router.centroids[4] = 30.0
    return layer, x


def test_a_token_whose_only_choice_is_null_gets_nothing_from_the_routed_experts() -> None:
    layer, x = null_layer(n_shared=0, top_k=1)
    y, routing = layer(x)
    assert (routing.experts == -1).all()
    assert not y.any()


def test_a_null_choice_leaves_one_place_less() -> None:
    layer, x = null_layer(n_shared=0, top_k=3)
    routing = layer(x).routing
    assert ((routing.experts >= 0).sum(dim=-1) == 2).all()
    assert (routing.scores.sum(dim=-1) < 1).all()
