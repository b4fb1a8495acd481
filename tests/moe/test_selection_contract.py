"""What every selection rule promises. A rule of the configuration is tested here before its author writes a test."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import seeds
from selection_cases import CASES, N_EXPERTS, WIDTH, Batch, Case, batch, run, trained

from moekit.config.balance import BalanceRule, BiasBalance
from moekit.config.errors import ConfigError
from moekit.moe.balance import build_rule
from moekit.moe.layer import MoE
from moekit.moe.routing import Routing
from moekit.moe.selection import SelectionRule
from moekit.moe.stats import load
from oracle.mixture import served

every_rule = pytest.mark.parametrize("case", CASES, ids=Case.name)
mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def check_routing(layer: MoE, routing: Routing, n_tokens: int) -> None:
    """What a routing is, whoever made it."""
    experts, weights, scores = routing.experts, routing.weights, routing.scores
    assert len(experts) == len(weights) == len(scores) == n_tokens
    assert experts.shape == weights.shape
    assert scores.shape[-1] == layer.config.n_choices
    assert experts.dtype == torch.int64
    assert weights.dtype == scores.dtype == routing.logits.dtype == torch.float32
    assert weights.isfinite().all() and scores.isfinite().all() and routing.logits.isfinite().all()
    assert ((experts >= -1) & (experts < scores.shape[-1])).all()
    assert not weights[experts < 0].any()
    assert (weights >= 0).all()
    # Empty places come last, and no expert serves a token twice.
    assert not ((experts[:, :-1] < 0) & (experts[:, 1:] >= 0)).any()
    for row in experts.tolist():
        real = [expert for expert in row if expert >= 0]
        assert len(real) == len(set(real))


@every_rule
@mode
@given(seed=seeds, n_sequences=st.integers(1, 3), length=st.integers(1, 6))
def test_a_routing_is_well_formed(case: Case, training: bool, seed: int, n_sequences: int, length: int) -> None:
    layer = case.layer(seed).train(training)
    y, routing = run(layer, batch(seed, n_sequences, length))
    check_routing(layer, routing, n_sequences * length)
    assert y.isfinite().all()


@every_rule
@mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing_is_float32_whatever_the_type_of_the_model(case: Case, training: bool, dtype: torch.dtype) -> None:
    layer = case.layer(dtype=dtype).train(training)
    y, routing = run(layer, batch(0, dtype=dtype))
    check_routing(layer, routing, 15)
    assert y.dtype == dtype


@every_rule
@mode
def test_ties_and_equal_tokens_are_ordinary(case: Case, training: bool) -> None:
    layer, given_ = case.layer().train(training), batch(0, 2, 6)
    for x in (torch.zeros_like(given_.x), given_.x[:1, :1].expand_as(given_.x)):
        y, routing = run(layer, given_._replace(x=x))
        check_routing(layer, routing, 12)
        assert y.isfinite().all()


@every_rule
@mode
def test_a_batch_without_tokens_is_ordinary(case: Case, training: bool) -> None:
    layer = case.layer().train(training)
    empty = Batch(torch.zeros(2, 0, WIDTH), torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    y, routing = run(layer, empty)
    assert y.shape == (2, 0, WIDTH)
    check_routing(layer, routing, 0)
    layer.after_step(layer.observe(routing))
    check_routing(layer, run(layer, batch(0)).routing, 15)


@every_rule
@mode
def test_a_batch_of_nothing_but_padding_is_ordinary(case: Case, training: bool) -> None:
    layer = case.layer().train(training)
    y, routing = run(layer, batch(0), torch.zeros(3, 5, dtype=torch.bool))
    assert y.isfinite().all()
    layer.after_step(layer.observe(routing))
    assert run(layer, batch(0)).y.isfinite().all()


@every_rule
def test_one_expert_is_ordinary_where_the_rule_allows_it(case: Case) -> None:
    try:
        layer = case._replace(settings=case.settings | _without_groups(case)).layer(n_routed=1, top_k=1)
    except ConfigError:
        return
    check_routing(layer, run(layer, batch(0)).routing, 15)


def _without_groups(case: Case) -> dict[str, int]:
    return {"n_groups": 1, "top_k_groups": 1} if "n_groups" in case.settings else {}


@every_rule
@mode
@given(seed=seeds)
def test_the_output_is_the_weighted_sum_of_the_experts(case: Case, training: bool, seed: int) -> None:
    layer, given_ = case.layer(seed).train(training), batch(seed, 2, 4)
    if type(layer.router.rule).combine is not SelectionRule.combine:
        return
    y, routing = run(layer, given_)
    stacks = layer.experts.gate_up, layer.experts.down
    expected = served(given_.x.flatten(0, 1), routing.experts, routing.weights, *stacks)
    torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


@every_rule
@given(seed=seeds)
def test_padding_changes_nothing_for_the_others(case: Case, seed: int) -> None:
    layer, given_ = trained(case.layer(seed)).eval(), batch(seed, 2, 6)
    mask = torch.arange(6) >= torch.tensor([[2], [0]])
    other = given_._replace(x=torch.where(mask.unsqueeze(-1), given_.x, 9 * given_.x + 1))
    one, two = run(layer, given_, mask).y, run(layer, other, mask).y
    torch.testing.assert_close(one[mask], two[mask], rtol=1e-5, atol=1e-6)


@every_rule
def test_the_same_seed_draws_the_same_routing_and_evaluation_draws_nothing(case: Case) -> None:
    layer, given_ = case.layer(), batch(0, 4, 8)
    one, two = run(layer, given_, seed=5).routing, run(layer, given_, seed=5).routing
    assert torch.equal(one.experts, two.experts) and torch.equal(one.weights, two.weights)
    layer.eval()
    one, two = run(layer, given_, seed=5).routing, run(layer, given_, seed=6).routing
    assert torch.equal(one.experts, two.experts) and torch.equal(one.weights, two.weights)


@every_rule
@mode
def test_a_forward_pass_changes_no_state(case: Case, training: bool) -> None:
    layer = trained(case.layer()).train(training)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.observe(run(layer, batch(0)).routing)
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in before.items())
    assert before.keys() == dict(layer.named_parameters()).keys()


@every_rule
def test_state_is_float32_and_survives_saving(case: Case) -> None:
    layer, other = trained(case.layer()).eval(), case.layer(1).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(layer, batch(0)).y, run(other, batch(0)).y)
    state = {name: p for name, p in layer.to(torch.bfloat16).named_parameters() if not p.requires_grad}
    assert all(parameter.dtype == torch.float32 for parameter in state.values())


@every_rule
def test_what_a_step_saw_adds_up_over_micro_batches(case: Case) -> None:
    layer, given_ = case.layer(), batch(0, 4, 6)
    parts = [Batch(*(part[rows] for part in given_)) for rows in (slice(0, 2), slice(2, 4))]
    whole = layer.observe(run(layer, parts[0]).routing) + layer.observe(run(layer, parts[1]).routing)
    assert int(whole.tokens) == 24
    assert int(whole.load.sum()) == int(whole.served)
    layer.after_step(whole)
    check_routing(layer, run(layer, given_).routing, 24)


@every_rule
def test_the_output_teaches_the_router_exactly_if_the_rule_learns(case: Case) -> None:
    layer = case.layer().train()
    target = torch.randn(3, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    (run(layer, batch(0, 3, 8)).y * target).sum().backward()
    centroids = layer.router.centroids
    assert (centroids is not None) == layer.config.routing.learns
    if centroids is not None:
        assert centroids.grad.abs().max() > 1e-6
    assert layer.experts.gate_up.grad.abs().max() > 1e-6


@every_rule
def test_outside_training_a_causal_rule_sees_no_later_token_and_another_does(case: Case) -> None:
    layer = trained(case.layer()).eval()
    changed = False
    for seed in range(10):
        given_ = batch(seed, 2, 8)
        other = batch(seed + 50, 2, 8)
        late = torch.arange(8) >= 4
        mixed = Batch(
            torch.where(late[:, None], other.x, given_.x), torch.where(late, other.ids, given_.ids), given_.tasks
        )
        one, two = run(layer, given_).y[:, :4], run(layer, mixed).y[:, :4]
        changed |= not torch.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert changed != layer.config.routing.causal


@every_rule
def test_a_bias_steers_the_choice_and_never_the_weights(case: Case) -> None:
    bias = BiasBalance()
    if not (case.rule().steerable and case.rule().learns):
        with pytest.raises(ConfigError, match="bias"):
            case.config(balance=(bias,))
        return
    layer = case.layer(balance=(bias,)).eval()
    given_, steered = batch(0, 4, 8), layer.balance["bias"].selection_bias
    plain = run(layer, given_).routing
    steered.data.fill_(3.0)
    shifted = run(layer, given_).routing
    assert torch.equal(plain.scores, shifted.scores)
    steered.data.zero_()[0] = 1000.0
    pulled = run(layer, given_).routing
    assert (load(pulled)[0] > load(plain)[0]) or load(plain)[0] == 32
    assert torch.equal(plain.scores, pulled.scores)
    assert pulled.weights.amax() <= plain.scores.amax().clamp_min(1.0) + 1e-6


@every_rule
@pytest.mark.parametrize("rule", get_args(BalanceRule), ids=lambda cls: cls.__name__)
def test_every_balancing_rule_that_fits_works_with_it(case: Case, rule: type) -> None:
    try:
        layer = case.layer(balance=(rule(),)).train()
    except ConfigError:
        return
    routing = run(layer, batch(0, 3, 8)).routing
    loss = build_rule(rule(), layer.config).loss(routing)
    if loss is not None:
        assert loss.isfinite()
        if loss.requires_grad:
            loss.backward()
            assert layer.router.centroids.grad.isfinite().all()
    layer.after_step(layer.observe(routing))
    check_routing(layer, run(layer, batch(1)).routing, 15)


@every_rule
def test_the_configuration_knows_how_many_parameters_the_router_has(case: Case) -> None:
    config = case.config()
    stored = sum(parameter.numel() for parameter in MoE(config).router.parameters())
    rows = config.routing.n_centroids(N_EXPERTS)
    assert stored == rows * WIDTH + config.routing.extra_parameters(N_EXPERTS, config.top_k, WIDTH)
