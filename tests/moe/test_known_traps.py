"""Where implementations of the layer go wrong (docs/traps.md): the traps that no other test of the layer closes."""

import re
from pathlib import Path

import pytest
import torch
from routing_cases import Shape, decide, generator, random_layer, routing_of, select
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moekit.config.balance import (
    BalanceRule,
    BiasBalance,
    CommunicationLoss,
    DeviceLoss,
    ExpertLoss,
    RouterZLoss,
    SequenceLoss,
)
from moekit.config.capacity import ExpertCapacity
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.moe.balance import build_rule
from moekit.moe.dispatch import dispatch
from moekit.moe.experts import Experts
from moekit.moe.routing import Routing
from moekit.moe.stats import Observed, load
from oracle.compare import relative_error

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "traps.md"
LAYER = {"width": 6, "expert_width": 5, "n_routed": 8, "top_k": 3}
LOSSES = [
    ExpertLoss(),
    DeviceLoss(n_devices=4),
    CommunicationLoss(n_devices=4, max_devices=2),
    SequenceLoss(),
    RouterZLoss(),
]


def random_logits(seed: int, n_tokens: int, n_experts: int = 8) -> Tensor:
    return torch.randn(n_tokens, n_experts, generator=generator(seed))


def tokens(seed: int, n_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n_tokens, 6, generator=generator(seed)).to(dtype)


def loss_of(rule: BalanceRule, routing: Routing, top_k: int) -> Tensor:
    config = MoEConfig(n_routed=routing.n_experts, top_k=top_k, balance=(rule,))
    loss = build_rule(rule, config).loss(routing)
    assert loss is not None
    return loss


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_the_balance_loss_of_transformers_is_top_k_times_ours(top_k: int) -> None:
    logits = random_logits(0, 40)
    mask = torch.arange(40) % 5 > 0
    ours = loss_of(ExpertLoss(coefficient=1.0, scope="micro_batch"), routing_of(logits, top_k, mask=mask), top_k)
    torch.testing.assert_close(load_balancing_loss_func((logits,), 8, top_k, mask.float()), top_k * ours)


def test_layers_collapsed_onto_different_experts_look_balanced_to_transformers_and_not_to_us() -> None:
    layers = [80.0 * torch.eye(4)[expert].expand(20, 4) for expert in range(4)]
    rule = ExpertLoss(coefficient=1.0)
    assert float(load_balancing_loss_func(tuple(layers), 4, 1)) == pytest.approx(1.0)
    assert [float(loss_of(rule, routing_of(logits, 1), 1)) for logits in layers] == pytest.approx([4.0] * 4)


@pytest.mark.parametrize("rule", LOSSES, ids=lambda rule: rule.kind)
def test_dropping_changes_no_balance_loss_and_no_load(rule: BalanceRule) -> None:
    settings = {**LAYER, "balance": (rule,)}
    whole = random_layer(0, **settings)
    full = random_layer(0, **settings, capacity=ExpertCapacity(factor=0.25))
    x = tokens(0, 40).view(2, 20, 6)
    routings = [layer(x).routing for layer in (whole, full)]
    assert routings[1].served is not None and (routings[1].served < 0).any()
    one, other = (loss_of(rule, routing, 3) for routing in routings)
    assert torch.equal(one, other)
    assert torch.equal(load(routings[0]), load(routings[1]))


def test_a_recomputed_forward_pass_counts_once() -> None:
    layer = random_layer(0, balance=(BiasBalance(rate=0.1),), **LAYER)
    bias, seen = layer.balance["bias"].bias(), []

    def run(x: Tensor) -> Tensor:
        y, routing = layer(x)
        seen.append(layer.observe(routing))
        return y

    with set_checkpoint_early_stop(False):
        y = checkpoint(run, tokens(0, 20).requires_grad_(), use_reentrant=False)
    first: Observed = seen[0]
    y.sum().backward()
    assert len(seen) == 2
    assert not bias.any()
    assert int(first.load.sum()) == 20 * 3
    layer.after_step(first)
    assert bias.abs().max() == pytest.approx(0.1)


def test_padding_does_not_drive_the_bias() -> None:
    padded, plain = (random_layer(0, balance=(BiasBalance(),), **LAYER) for _ in range(2))
    x, padding = tokens(0, 20), tokens(1, 1).expand(500, 6)
    mask = torch.arange(520) < 20
    padded.after_step(padded.observe(padded(torch.cat([x, padding]), mask).routing))
    plain.after_step(plain.observe(plain(x).routing))
    assert plain.balance["bias"].bias().any()
    assert torch.equal(padded.balance["bias"].bias(), plain.balance["bias"].bias())


def test_epsilon_stands_in_the_sum_and_nowhere_else() -> None:
    logits = random_logits(0, 30)
    scores = select(TopKRouting(score="sigmoid"), 3, logits).weights
    found = select(TopKRouting(score="sigmoid", renormalise=True, epsilon=0.5), 3, logits).weights
    torch.testing.assert_close(found, scores / (scores.sum(dim=-1, keepdim=True) + 0.5))


@pytest.mark.parametrize("epsilon", [0.0, 1e-20])
def test_scores_that_underflow_to_zero_divide_nothing_by_zero(epsilon: float) -> None:
    rule = TopKRouting(score="sigmoid", renormalise=True, epsilon=epsilon)
    logits = torch.full((4, 8), -200.0, requires_grad=True)
    weights = select(rule, 3, logits).weights
    weights.sum().backward()
    assert not weights.any()
    assert logits.grad.isfinite().all()


def test_the_three_worths_of_a_group_choose_three_groups() -> None:
    scores = torch.tensor([[0.9, 0.01, 0.01, 0.7, 0.7, 0.01, 0.5, 0.5, 0.5]])
    chosen = {}
    for worth in ("max", "top2_sum", "top_sum"):
        rule = TopKRouting(score="sigmoid", n_groups=3, top_k_groups=1, group_score=worth)  # type: ignore[arg-type]
        chosen[worth] = set((select(rule, 3, scores.logit()).experts // 3).flatten().tolist())
    assert chosen == {"max": {0}, "top2_sum": {1}, "top_sum": {2}}


def one_place_each(n_tokens: int, weights: Tensor) -> Routing:
    experts = torch.arange(weights.shape[1]).expand(n_tokens, -1).contiguous()
    scores = torch.ones(n_tokens, weights.shape[1])
    return Routing(experts, weights, scores, scores)


def test_the_weight_is_applied_after_the_last_product() -> None:
    experts = Experts(1, 16, 24).to(torch.bfloat16)
    torch.nn.init.normal_(experts.gate_up, generator=generator(0))
    torch.nn.init.normal_(experts.down, generator=generator(1))
    x = torch.randn(30, 16, generator=generator(2)).to(torch.bfloat16)
    weights = torch.rand(30, 1, generator=generator(3)).to(torch.bfloat16).float()
    whole, weighted = (
        experts(x, routing.weights, dispatch(routing))
        for routing in (one_place_each(30, torch.ones(30, 1)), one_place_each(30, weights))
    )
    exact = weights * whole.float()
    # Of a product that is rounded once. Rounding weight times inner number before the sum over these is seen above it.
    assert ((weighted.float() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize(
    ("outputs", "weights", "total"),
    [
        # bfloat16 cannot add 0.5 to 256 one by one.
        ([256.0] + [0.5] * 8, [1.0] * 9, 260.0),
        # (1 + 1/128)^2 is no bfloat16 number; rounded before the sum, it would leave 0.
        ([1 + 2**-7, -1 - 2**-6], [1 + 2**-7, 1.0], 2**-14),
    ],
)
def test_the_weighted_sum_over_a_tokens_experts_is_taken_in_float32(
    outputs: list[float], weights: list[float], total: float
) -> None:
    experts = Experts(len(outputs), 1, 1).to(torch.bfloat16)
    # silu(32) * 32 = 1024.
    experts.gate_up.data.fill_(32.0)
    experts.down.data.copy_(torch.tensor(outputs).view(-1, 1, 1) / 1024)
    routing = one_place_each(1, torch.tensor([weights]))
    y = experts(torch.ones(1, 1, dtype=torch.bfloat16), routing.weights, dispatch(routing))
    assert y.item() == total


def test_the_order_of_a_tokens_experts_means_nothing() -> None:
    case = decide(Shape(0, 12, 6, 4, 5, 4, "with_holes", False))
    order = torch.rand(12, 4, generator=generator(1)).argsort(dim=-1)
    chosen, weights = case.routing.experts.gather(-1, order), case.routing.weights.gather(-1, order)
    other = case.routing._replace(experts=chosen, weights=weights)
    one, two = (case.experts(case.x, routing.weights, dispatch(routing)) for routing in (case.routing, other))
    assert relative_error(one, two) <= 1e-6
    assert torch.equal(load(case.routing), load(other))


def test_shared_experts_are_averaged_with_the_routed_ones_where_that_is_asked_for() -> None:
    summed, averaged = random_layer(0, n_shared=2, **LAYER), random_layer(0, n_shared=2, shared_average=True, **LAYER)
    x = tokens(0, 10)
    shared = summed.shared(x)
    routed = summed(x).y - shared
    assert relative_error(averaged(x).y, (shared + 3 * routed) / 4) <= 1e-5


def test_evaluation_mode_still_gives_experts_and_router_their_gradients() -> None:
    x = tokens(0, 10)
    gradients = []
    for training in (True, False):
        layer = random_layer(0, **LAYER).train(training)
        layer(x).y.square().sum().backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters()})
    assert all(gradient.any() for gradient in gradients[1].values())
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_a_dropped_place_leaves_the_weights_of_the_others_alone() -> None:
    settings = {**LAYER, "routing": TopKRouting(renormalise=True)}
    whole = random_layer(0, **settings)
    full = random_layer(0, **settings, capacity=ExpertCapacity(factor=0.5, drop="position"))
    x = tokens(0, 40)
    one, other = whole(x).routing, full(x).routing
    kept = other.served == other.experts
    assert kept.any() and not kept.all()
    assert torch.equal(other.weights[kept], one.weights[kept])


NAMED = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE.read_text("utf-8")) if PAGE.is_file() else []


def test_the_page_of_traps_names_tests_that_exist() -> None:
    assert len(NAMED) > 50
    missing = [f"{path}::{name}" for path, name in NAMED if f"\ndef {name}(" not in (ROOT / path).read_text("utf-8")]
    assert not missing


@pytest.mark.parametrize("path", ["tests/moe/test_known_traps.py", "tests/train/test_known_traps_in_training.py"])
def test_every_trap_that_has_a_test_here_is_on_the_page(path: str) -> None:
    written = set(re.findall(r"^def (test_\w+)\(", (ROOT / path).read_text("utf-8"), flags=re.MULTILINE))
    about_the_page = {"test_the_page_of_traps_names_tests_that_exist"}
    about_the_page.add("test_every_trap_that_has_a_test_here_is_on_the_page")
    assert written - about_the_page == {name for named, name in NAMED if named == path}
