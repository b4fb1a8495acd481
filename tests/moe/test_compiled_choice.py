"""The compiled choice of many tokens, and its gradients, are those of the rule in plain torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.config.balance import BiasBalance
from moekit.config.capacity import ExpertCapacity
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.kernels import logits
from moekit.kernels.choice import Chosen
from moekit.kernels.library import library
from moekit.kernels.linear import MOST
from moekit.moe.layer import MoE
from moekit.moe.selection.compiled_choice import compiled_choice
from moekit.moe.selection.rule import Selection, Tokens
from moekit.moe.selection.top_k import Rule, select_top_k
from oracle.compare import relative_error

ROUTINGS = (
    TopKRouting(),
    TopKRouting(renormalise=True, epsilon=1e-20, scale=2.0),
    TopKRouting(renormalise=True, epsilon=0.1),
    TopKRouting(score="sigmoid"),
    TopKRouting(score="sigmoid", n_groups=4, top_k_groups=2, group_score="top2_sum", renormalise=True, scale=2.5),
    TopKRouting(score="sigmoid", order="top_k_then_score", renormalise=True, epsilon=0.5),
    TopKRouting(score="sqrt_softplus", renormalise=True, epsilon=1e-20),
    TopKRouting(order="top_k_then_score"),
    TopKRouting(n_groups=2, top_k_groups=1),
)
needs_wide = pytest.mark.skipif(
    library() is None or library().moekit_level() < 2, reason="no compiled choice on this machine"
)


def rule_of(routing: TopKRouting, n_experts: int, top_k: int, width: int) -> Rule:
    config = MoEConfig(width=width, expert_width=16, n_routed=n_experts, top_k=top_k, routing=routing, n_shared=0)
    return Rule(routing, config)


def both(
    routing: TopKRouting, top_k: int, x: Tensor, centroids: Tensor, bias: Tensor | None, factor: Tensor | None
) -> tuple[Chosen, Selection, Tensor]:
    """The compiled choice, that of the rule, and the rule's logits, both in float64."""
    way = rule_of(routing, *centroids.shape[:1], top_k, x.shape[-1]).way()
    found, exact = compiled_choice(x, centroids, way, (bias, factor)), x.double() @ centroids.double().T
    steering = (None if each is None else each.double() for each in (bias, factor))
    return found, select_top_k(routing, top_k, exact, Tokens(x, *steering)), exact


@needs_wide
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(1, 70),
    width=st.integers(1, 5),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 6),
    routing=st.sampled_from(ROUTINGS),
    steered=st.tuples(st.booleans(), st.booleans()),
    looked_at=st.sampled_from(["weights", "scores", "logits", "weights and scores", "all"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_compiled_choice_and_its_gradients_are_the_rules(
    seed: int,
    n: int,
    width: int,
    experts: int,
    top_k: int,
    routing: TopKRouting,
    steered: tuple[bool, bool],
    looked_at: str,
    dtype: torch.dtype,
) -> None:
    source = torch.Generator().manual_seed(seed)
    x, centroids = (
        torch.randn(rows, 16 * width, generator=source).div(width**0.5).to(dtype).requires_grad_()
        for rows in (n, 16 * experts)
    )
    bias, factor = (0.1 * torch.randn(16 * experts, generator=source) if each else None for each in steered)
    factor = None if factor is None else 1 + factor
    found, expected, exact = both(routing, top_k, x, centroids, bias, factor)
    # Where two are alike to the last digits, either may be chosen.
    same = (found.experts == expected.experts).all(dim=-1)
    assert same.float().mean() >= 0.9 or n < 20
    assert relative_error(found.scores, expected.scores) < 1e-5
    assert relative_error(found.weights[same], expected.weights[same]) < 1e-5

    def loss(weights: Tensor, scores: Tensor, router_logits: Tensor) -> Tensor:
        given = torch.Generator().manual_seed(seed)
        terms = {"weights": weights * same.unsqueeze(-1), "scores": scores, "logits": router_logits}
        names = {"all": tuple(terms), "weights and scores": ("weights", "scores")}.get(looked_at, (looked_at,))
        parts = {name: torch.randn(each.shape, generator=given) for name, each in terms.items()}
        return sum(((terms[name] * parts[name]).sum() for name in names), torch.zeros(()))

    own = torch.autograd.grad(loss(found.weights, found.scores, found.logits), (x, centroids))
    others = torch.autograd.grad(loss(expected.weights, expected.scores, exact), (x, centroids))
    for mine, other in zip(own, others, strict=True):
        assert mine.dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else 2**-7
        assert (mine.double() - other.double()).norm() <= limit * other.norm() + 1e-6


@needs_wide
def test_of_equal_experts_the_first_are_chosen() -> None:
    x, centroids = torch.ones(20, 16), torch.ones(48, 16)
    found = compiled_choice(x, centroids, rule_of(TopKRouting(), 48, 5, 16).way(), (None, None))
    assert found.experts.tolist() == [[0, 1, 2, 3, 4]] * 20


@needs_wide
@given(
    seed=st.integers(0, 2**31 - 1),
    n_experts=st.integers(1, 600),
    top_k=st.integers(1, 80),
    levels=st.integers(1, 999),
    n_tokens=st.sampled_from([MOST, MOST + 9]),
)
def test_the_best_of_any_number_of_experts_are_those_that_a_stable_sort_finds(
    seed: int, n_experts: int, top_k: int, levels: int, n_tokens: int
) -> None:
    # Few tokens are routed as they are decoded, many in whole vectors; with few levels, many experts are equal.
    n_experts = n_experts if n_tokens <= MOST else 16 * (n_experts // 16 + 1)
    top_k, routing = min(top_k, n_experts), TopKRouting(score="sigmoid")
    config = MoEConfig(width=16, expert_width=16, n_routed=n_experts, n_shared=0, top_k=top_k, routing=routing)
    layer = MoE(config).bfloat16()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.router.centroids.copy_(torch.randint(0, levels, (n_experts, 16), generator=source) / 100)
        found = layer(torch.eye(n_tokens, 16).bfloat16()).routing
    expected = found.scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.experts, expected.indices[:, :top_k])
    assert torch.equal(found.weights, expected.values[:, :top_k])


@needs_wide
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_what_is_not_a_number_is_seen_and_chooses_no_expert_twice(score: str) -> None:
    x, centroids = torch.randn(20, 16), torch.randn(48, 16)
    x[3, 5], x[4], centroids[7, 2] = torch.nan, torch.inf, torch.nan
    found = compiled_choice(x, centroids, rule_of(TopKRouting(score=score), 48, 5, 16).way(), (None, None))
    assert all(len(set(each)) == 5 and min(each) >= 0 and max(each) < 48 for each in found.experts.tolist())
    assert found.weights[3].isnan().all()
    assert not found.scores[0].isfinite().all()


@needs_wide
@pytest.mark.parametrize("looks_at_scores", [False, True])
def test_a_choice_and_its_gradients_do_not_depend_on_threads(looks_at_scores: bool) -> None:
    source, threads, found = torch.Generator().manual_seed(0), torch.get_num_threads(), list[list[Tensor]]()
    x, centroids = (torch.randn(n, 272, generator=source).bfloat16().requires_grad_() for n in (999, 48))
    way = rule_of(TopKRouting(score="sigmoid", renormalise=True), 48, 5, 272).way()
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        chosen = compiled_choice(x, centroids, way, (None, None))
        loss = chosen.weights.pow(2).sum() + (chosen.scores.pow(2).sum() if looks_at_scores else 0)
        found.append([*chosen, *torch.autograd.grad(loss, (x, centroids))])
    torch.set_num_threads(threads)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


@needs_wide
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_it_learns_as_one_without(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    routing = TopKRouting(score="sigmoid", renormalise=True, epsilon=1e-20, scale=2.5)
    config = MoEConfig(width=64, expert_width=32, n_routed=16, top_k=4, routing=routing, balance=(BiasBalance(),))
    torch.manual_seed(0)
    layer, x = MoE(config).to(dtype), torch.randn(3, 40, 64).to(dtype).requires_grad_()

    def gradients() -> list[Tensor]:
        out = layer(x)
        parameters = [each for each in layer.parameters() if each.requires_grad]
        return list(torch.autograd.grad(out.y.float().pow(2).sum(), (x, *parameters)))

    own = gradients()
    monkeypatch.setattr(logits, "library", lambda: None)
    for mine, other in zip(own, gradients(), strict=True):
        assert relative_error(mine, other) < (1e-5 if dtype == torch.float32 else 2**-6)


@needs_wide
def test_capacities_and_few_tokens_are_left_to_the_rule() -> None:
    config = MoEConfig(width=32, expert_width=16, n_routed=16, top_k=2, capacity=ExpertCapacity(factor=1.0))
    layer, x = MoE(config).train(), torch.randn(1, 64, 32)
    assert layer(x).routing.served is not None
    assert type(layer(x).routing.scores.grad_fn).__name__ == "SoftmaxBackward0"
    layer = MoE(MoEConfig(width=32, expert_width=16, n_routed=16, top_k=2))
    assert type(layer(x).routing.scores.grad_fn).__name__ == "CompiledChoiceBackward"
    assert type(layer(x[:, :8]).routing.scores.grad_fn).__name__ == "SoftmaxBackward0"
