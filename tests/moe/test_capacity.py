"""Who is served where there is room for so many only, and with which weight: as a plain loop finds it."""

from typing import Any

import pytest
import torch
from capacity_cases import DROPS, Shape, asked, by_the_twin, real, shapes, twin_weights
from hypothesis import assume, given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, randomise, seeds
from torch import Tensor

import oracle.capacity as twin
from moekit.config.capacity import Capacity, DeviceCapacity, DynamicCapacity, ExpertCapacity
from moekit.config.moe import MoEConfig
from moekit.config.routing import GShardRouting, ProjectionRouting, TopKRouting
from moekit.moe.capacity import CapacityLimit, build_capacity
from moekit.moe.layer import MoE
from moekit.moe.routing import Routing
from moekit.moe.stats import load, observe
from oracle.compare import relative_error
from oracle.mixture import served as served_experts
from oracle.mixture import swiglu

factors = st.sampled_from([0.01, 0.25, 0.5, 0.8, 1.0, 1.1, 1.25, 2.0])
SIZES = {"width": 6, "expert_width": 5, "n_routed": 6, "top_k": 2, "n_shared": 1}
EVERY = (
    ExpertCapacity(factor=0.5),
    ExpertCapacity(factor=0.75, dropped="next_best"),
    ExpertCapacity(factor=0.5, scope="sequence", drop="batch_priority", dropped="residual"),
    ExpertCapacity(factor=0.5, drop="random"),
    DynamicCapacity(factor=0.5, drop="probability"),
    DeviceCapacity(factor=0.5, n_devices=3, protected=0.3),
    DeviceCapacity(factor=0.5, n_devices=3, protected=0.3, dropped="residual"),
)


def name(capacity: Any) -> str:
    return "-".join(
        str(getattr(capacity, key)) for key in ("kind", "scope", "drop", "dropped") if hasattr(capacity, key)
    )


def built(config: MoEConfig) -> CapacityLimit:
    limit = build_capacity(config)
    assert limit is not None
    return limit


def limited(shape: Shape, capacity: Capacity, seed: int = 0) -> Routing:
    given_ = asked(shape)
    return built(shape.config(capacity=capacity)).limit(given_.routing, given_.ranking, generator(seed))


@pytest.mark.parametrize("dropped", ["shared", "next_best"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("drop", DROPS)
@given(shape=shapes(), factor=factors)
def test_experts_serve_whom_the_twin_serves(drop: Any, scope: Any, dropped: Any, shape: Shape, factor: float) -> None:
    capacity = ExpertCapacity(factor=factor, scope=scope, drop=drop, dropped=dropped)
    config, found = shape.config(capacity=capacity), limited(shape, capacity, shape.seed)
    by_sequence, next_best = scope == "sequence", dropped == "next_best"
    expected = by_the_twin(asked(shape), config, [factor] * config.n_choices, drop, shape.seed, by_sequence, next_best)
    assert found.served is not None
    assert found.served.tolist() == expected
    torch.testing.assert_close(found.weights, twin_weights(asked(shape).routing, expected), rtol=1e-6, atol=0)
    assert torch.equal(found.experts, asked(shape).routing.experts)


@pytest.mark.parametrize("dropped", ["shared", "next_best"])
@given(shape=shapes())
def test_dynamic_capacity_gives_each_expert_its_own_room(dropped: Any, shape: Shape) -> None:
    capacity = DynamicCapacity(dropped=dropped)
    config, given_ = shape.config(capacity=capacity), asked(shape)
    limit = built(config)
    own = (torch.rand(config.n_choices, generator=generator(shape.seed)) * 20 + 1).round() / 10
    limit.load_state_dict({"factors": own, "use": torch.ones_like(own)})
    found = limit.limit(given_.routing, given_.ranking, None)
    expected = by_the_twin(given_, config, own.tolist(), "position", 0, False, dropped == "next_best")
    assert found.served is not None
    assert found.served.tolist() == expected


@given(shape=shapes(), factor=factors, n_devices=st.integers(1, 3), protected=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_devices_serve_whom_the_twin_serves(shape: Shape, factor: float, n_devices: int, protected: float) -> None:
    shape = shape._replace(n_experts=n_devices * 2, top_k=min(shape.top_k, n_devices * 2), common=0)
    capacity = DeviceCapacity(factor=factor, n_devices=n_devices, protected=protected)
    given_ = asked(shape)
    routing = given_.routing
    found = built(shape.config(capacity=capacity)).eval().limit(routing, given_.ranking, None)
    sequences = [real(routing)[b * shape.length : (b + 1) * shape.length] for b in range(shape.n_sequences)]
    full = [b for b, tokens in enumerate(sequences) if any(tokens)]
    first = full[: int(len(full) * protected + 0.5)]
    safe = [t // shape.length in first for t in range(len(routing.experts))]
    room = twin.room(factor, sum(real(routing)) * shape.top_k, n_devices)
    device_of = [expert // 2 for expert in range(shape.n_experts)]
    expected = twin.by_devices(routing.experts.tolist(), routing.weights.tolist(), real(routing), device_of, room, safe)
    assert found.served is not None
    assert found.served.tolist() == expected
    torch.testing.assert_close(found.weights, twin_weights(routing, expected), rtol=0, atol=0)


@given(shape=shapes(), seed=seeds)
def test_in_training_chance_protects_as_many_whole_sequences(shape: Shape, seed: int) -> None:
    shape = shape._replace(
        n_experts=2, top_k=1, common=0, n_sequences=3, padded=False, length=5, pattern="same_for_all"
    )
    capacity = DeviceCapacity(factor=0.01, n_devices=1, protected=0.5)
    found = limited(shape, capacity, seed)
    whole = (found.served.view(3, -1) >= 0).all(dim=-1)
    assert int(whole.sum()) == 2
    assert torch.equal(found.served.view(3, -1)[~whole], torch.full((1, 5), -1))


def test_another_seed_protects_other_sequences_and_drops_others_at_random() -> None:
    shape = Shape(0, 6, 5, 2, 1, 0, "any", False, False, 1.0)
    for capacity in (DeviceCapacity(factor=0.1, protected=0.5), ExpertCapacity(factor=0.5, drop="random")):
        rows = {str(limited(shape, capacity, seed).served.tolist()) for seed in range(6)}
        assert len(rows) > 1
        again = [limited(shape, capacity, 3).served for _ in range(2)]
        assert torch.equal(*again)


@pytest.mark.parametrize("capacity", EVERY, ids=name)
@given(shape=shapes(), n_padding=st.integers(1, 4))
def test_padding_changes_nothing_for_real_tokens(capacity: Capacity, shape: Shape, n_padding: int) -> None:
    shape = shape._replace(n_experts=6, top_k=min(shape.top_k, 6), common=0, padded=False)
    given_ = asked(shape)
    plain = built(shape.config(capacity=capacity)).limit(given_.routing, given_.ranking, generator(1))
    other = asked(shape._replace(seed=shape.seed ^ 1, length=n_padding, pattern="any"))

    def joined(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([x.view(shape.n_sequences, -1, x.shape[-1]) for x in (a, b)], 1).flatten(0, 1)

    at = (torch.arange(shape.length + n_padding) < shape.length).repeat(shape.n_sequences)
    fields = {key: joined(getattr(given_.routing, key), getattr(other.routing, key)) for key in Routing._fields[:4]}
    padded = Routing(**fields, n_sequences=shape.n_sequences, mask=at)
    limit = built(shape.config(capacity=capacity))
    found = limit.limit(padded, joined(given_.ranking, other.ranking), generator(1))
    assert torch.equal(found.served[at], plain.served)
    assert torch.equal(found.weights[at], plain.weights)
    assert torch.equal(found.served[~at], padded.experts[~at])


@pytest.mark.parametrize("capacity", EVERY, ids=name)
@given(shape=shapes())
def test_no_expert_serves_a_token_twice_and_empty_places_weigh_nothing(capacity: Capacity, shape: Shape) -> None:
    shape = shape._replace(n_experts=6, top_k=min(shape.top_k, 6), common=0)
    found = limited(shape, capacity)
    for experts, weights in zip(found.served.tolist(), found.weights.tolist(), strict=True):
        serving = [expert for expert in experts if expert >= 0]
        assert len(serving) == len(set(serving))
        assert all(weight == 0 for expert, weight in zip(experts, weights, strict=True) if expert < 0)


def test_room_is_not_one_more_because_of_rounding() -> None:
    shape = Shape(0, 1, 10, 1, 1, 0, "any", False, False, 1.0)
    assert int((limited(shape, ExpertCapacity(factor=0.7)).served >= 0).sum()) == 7
    assert int((limited(shape._replace(length=100), ExpertCapacity(factor=0.07)).served >= 0).sum()) == 7
    assert 0.07 * 100 > 7


def test_a_gate_matrix_is_replaced_by_a_gate_matrix_alone_and_devices_hold_whole_experts() -> None:
    config = MoEConfig(width=4, n_routed=2, top_k=1, routing=ProjectionRouting(), capacity=ExpertCapacity(factor=0.5))
    experts = torch.tensor([[0, 2, 5]] * 4)
    scores = torch.rand(4, 6, generator=generator(0)) + 0.1
    routing = Routing(experts, scores.gather(-1, experts), scores, scores)
    moved = built(config_with(config, ExpertCapacity(factor=0.5, dropped="next_best"))).limit(routing, scores, None)
    # Each of the six matrices has room for one of the four tokens that ask for it; its sister takes one more.
    assert moved.served.tolist() == [[0, 2, 5], [1, 3, 4], [-1, -1, -1], [-1, -1, -1]]
    device = DeviceCapacity(factor=1.0, n_devices=2, protected=0.0)
    kept = built(config_with(config, device)).limit(routing, scores, None).served
    # Matrices 0 and 2 are on device 0 with room for six of eight, matrix 5 on device 1.
    assert [(kept[:, :2] >= 0).sum().item(), (kept[:, 2] >= 0).sum().item()] == [6, 4]


def config_with(config: MoEConfig, capacity: Capacity) -> MoEConfig:
    return MoEConfig(width=4, n_routed=config.n_routed, top_k=1, routing=config.routing, capacity=capacity)


# The whole layer.


def dense(layer: MoE, x: Tensor, routing: Routing) -> Tensor:
    """The layer's output for places served as in `routing`, from softmax scores, token by token."""
    scores = (x @ layer.router.centroids.T).softmax(dim=-1)
    assert routing.served is not None
    weights = scores.gather(-1, routing.served.clamp_min(0)) * (routing.served >= 0)
    y = served_experts(x, routing.served, weights, layer.experts.gate_up, layer.experts.down)
    shared = torch.stack([swiglu(u, layer.shared.gate_up.weight, layer.shared.down.weight) for u in x])
    if layer.config.capacity.dropped == "residual":
        shared = shared * (routing.served >= 0).any(dim=-1, keepdim=True)
    return y + shared


@pytest.mark.parametrize("capacity", EVERY, ids=name)
@given(seed=seeds)
def test_output_and_gradients_are_those_of_the_served_places(capacity: Capacity, seed: int) -> None:
    layer = random_layer(seed, capacity=capacity, **SIZES)
    x = torch.randn(3, 4, 6, generator=generator(seed)).requires_grad_()
    direction = torch.randn(12, 6, generator=generator(seed + 1))
    y, routing = layer(x, generator=generator(seed))
    assert not torch.equal(routing.served, routing.experts)
    expected = dense(layer, x.flatten(0, 1), routing)
    assert relative_error(y.flatten(0, 1), expected) <= 1e-5
    inputs = {"x": x} | {key: p for key, p in layer.named_parameters() if p.requires_grad}
    mine = torch.autograd.grad(y.flatten(0, 1), list(inputs.values()), direction)
    theirs = torch.autograd.grad(expected, list(inputs.values()), direction)
    for key, one, other in zip(inputs, mine, theirs, strict=True):
        assert relative_error(one, other) <= 1e-4, key


ENOUGH = (
    ExpertCapacity(factor=100.0),
    ExpertCapacity(factor=100.0, scope="sequence", drop="probability", dropped="next_best"),
    ExpertCapacity(factor=100.0, drop="random", dropped="residual"),
    DynamicCapacity(factor=100.0, largest=100.0, drop="batch_priority"),
    DeviceCapacity(factor=100.0, n_devices=3),
    DeviceCapacity(factor=0.01, n_devices=3, protected=1.0),
)


@pytest.mark.parametrize("capacity", ENOUGH, ids=name)
@given(seed=seeds, padded=st.booleans())
def test_with_enough_room_the_layer_is_the_same_bit_for_bit(capacity: Capacity, seed: int, padded: bool) -> None:
    x = torch.randn(3, 4, 6, generator=generator(seed))
    mask = torch.rand(3, 4, generator=generator(seed)) < 0.7 if padded else None
    found = []
    for limit in (None, capacity):
        layer = random_layer(seed, capacity=limit, **SIZES)
        y = layer(x, mask).y
        grads = torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])
        found.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("capacity", EVERY, ids=name)
def test_statistics_count_the_assignment_before_dropping_and_what_was_served(capacity: Capacity) -> None:
    x, mask = torch.randn(3, 4, 6, generator=generator(1)), torch.arange(12).view(3, 4) % 4 < 3
    layer, free = (random_layer(1, capacity=limit, **SIZES) for limit in (capacity, None))
    routing = layer(x, mask, generator=generator(0)).routing
    assert torch.equal(load(routing), load(free(x, mask).routing))
    seen = observe(routing)
    assert int(seen.tokens) == 9
    assert int(seen.served) == int((routing.served[mask.flatten()] >= 0).sum())
    assert int(seen.served) < int(seen.load.sum()) == 18 or capacity.dropped == "next_best"


@pytest.mark.parametrize("capacity", EVERY, ids=name)
def test_evaluation_drops_nothing_unless_told_to_and_then_always_the_same(capacity: Capacity) -> None:
    x = torch.randn(3, 4, 6, generator=generator(1))
    layer = random_layer(1, capacity=capacity, **SIZES).eval()
    assert layer(x).routing.served is None
    fields = {key: getattr(capacity, key) for key in capacity.__dataclass_fields__}
    told = random_layer(1, capacity=type(capacity)(**fields | {"in_evaluation": True}), **SIZES).eval()
    first, second = told(x, generator=generator(0)).routing, told(x, generator=generator(1)).routing
    assert not torch.equal(first.served, first.experts)
    assert torch.equal(first.served, second.served)


def test_under_residual_a_token_that_chose_no_expert_keeps_the_shared_ones() -> None:
    """Such a token was not dropped: nobody turned it away."""
    layer = random_layer(0, capacity=ExpertCapacity(dropped="residual"), **SIZES)
    x, zeros = torch.randn(3, 6, generator=generator(0)), torch.zeros(3, 6)
    routing = layer(x).routing._replace(
        experts=torch.tensor([[-1, -1], [1, -1], [1, 2]]), served=torch.tensor([[-1, -1], [-1, -1], [-1, 2]])
    )
    kept = layer._with_shared(x, zeros, routing)
    assert torch.equal(kept[[0, 2]], layer.shared(x)[[0, 2]])
    assert torch.equal(kept[1], zeros[1])


def test_a_second_choice_that_gshard_did_not_keep_asks_for_no_room() -> None:
    config = {**SIZES, "routing": GShardRouting(), "capacity": ExpertCapacity(factor=100.0, dropped="next_best")}
    layer = random_layer(0, **config)
    routing = layer(torch.randn(40, 6, generator=generator(0)), generator=generator(0)).routing
    assert (routing.experts < 0).any()
    assert torch.equal(routing.served, routing.experts)


def test_next_best_keeps_the_scale_of_weights_that_are_not_renormalised() -> None:
    capacity = ExpertCapacity(factor=1.0, dropped="next_best")
    layer = random_layer(0, capacity=capacity, routing=TopKRouting(scale=4.0), **SIZES)
    routing = layer(torch.randn(12, 6, generator=generator(0))).routing
    moved = (routing.served >= 0) & (routing.served != routing.experts)
    assert moved.any()
    expected = 4.0 * routing.scores.gather(-1, routing.served.clamp_min(0))
    assert torch.equal(routing.weights[moved], expected[moved])


def test_a_score_of_zero_makes_no_weight_that_is_not_a_number() -> None:
    config = MoEConfig(width=4, n_routed=4, top_k=2, capacity=ExpertCapacity(factor=0.5, dropped="next_best"))
    # The first choice has a score of 0 and often no room; of the experts with room, one has a score and one has none.
    logits = torch.tensor([[200.0, 0.0, 200.0, 0.0]] * 4, requires_grad=True)
    scores, experts = logits.softmax(dim=-1), torch.tensor([[1, 0]] * 4)
    routing = Routing(experts, scores.gather(-1, experts), scores, logits)
    found = built(config).limit(routing, scores.detach(), None)
    (1000 * found.weights).sum().backward()
    assert found.served.tolist() == [[1, 0], [2, -1], [-1, -1], [-1, -1]]
    assert found.weights.isfinite().all()
    assert logits.grad.isfinite().all()


# Factors that follow the load.


@given(seed=seeds, n_steps=st.integers(1, 12))
def test_factors_follow_the_running_average_of_use(seed: int, n_steps: int) -> None:
    capacity = DynamicCapacity(factor=1.0)
    config = MoEConfig(width=4, n_routed=4, top_k=2, capacity=capacity)
    limit = built(config)
    loads = torch.randint(0, 40, (n_steps, 4), generator=generator(seed))
    own, use = [1.0] * 4, [None] * 4
    for step in loads.tolist():
        tokens = sum(step) // 2
        limit.after_step(torch.tensor(step), torch.tensor(tokens))
        for e in range(4):
            now = step[e] / twin.room(own[e], tokens * 2, 4)
            use[e] = now if use[e] is None else 0.9 * use[e] + 0.1 * now
            # So near to a threshold rounding decides.
            assume(min(abs(use[e] - 0.5), abs(use[e] - 1.5)) > 1e-5)
            change = 0.8 if use[e] < 0.5 else 1.2 if use[e] > 1.5 else 1.0
            own[e] = min(max(own[e] * change, 0.5), 4.0)
    torch.testing.assert_close(limit.use, torch.tensor(use), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(limit.factors.detach(), torch.tensor(own), rtol=1e-5, atol=1e-6)


def test_factors_shrink_below_low_and_grow_above_high_and_not_at_them() -> None:
    limit = built(MoEConfig(width=4, n_routed=4, top_k=2, capacity=DynamicCapacity(factor=1.0)))
    # Ten tokens of two places: each expert has room for five.
    limit.after_step(torch.tensor([5, 2, 8, 5]), torch.tensor(10))
    torch.testing.assert_close(limit.use.detach(), torch.tensor([1.0, 0.4, 1.6, 1.0]))
    torch.testing.assert_close(limit.factors.detach(), torch.tensor([1.0, 0.8, 1.2, 1.0]))
    even = built(MoEConfig(width=4, n_routed=4, top_k=2, capacity=DynamicCapacity(factor=1.0)))
    even.after_step(torch.tensor([2, 2, 6, 6]), torch.tensor(8))
    assert torch.equal(even.use.detach(), torch.tensor([0.5, 0.5, 1.5, 1.5]))
    assert torch.equal(even.factors.detach(), torch.ones(4))


def test_factors_change_after_a_step_alone_and_stay_float32() -> None:
    layer = random_layer(0, torch.bfloat16, capacity=DynamicCapacity(), **SIZES)
    x = torch.randn(4, 6, generator=generator(0)).to(torch.bfloat16)
    for mode in (True, False):
        layer.train(mode)
        layer(x)
    limit = layer.router.capacity
    assert limit.factors.dtype == limit.use.dtype == torch.float32
    assert torch.equal(limit.factors, torch.full((6,), 1.25))
    assert torch.equal(limit.use, torch.full((6,), -1.0))
    layer.train()
    layer.after_step(layer.observe(layer(x.expand(4, 4, 6)).routing))
    assert (limit.use >= 0).all()


def test_a_step_without_tokens_leaves_factors_as_they_were() -> None:
    layer = random_layer(0, capacity=DynamicCapacity(), **SIZES)
    before = {key: value.clone() for key, value in layer.router.capacity.state_dict().items()}
    layer.after_step(layer.observe(layer(torch.zeros(0, 6)).routing))
    assert all(torch.equal(value, before[key]) for key, value in layer.router.capacity.state_dict().items())


@pytest.mark.parametrize("capacity", EVERY, ids=name)
def test_the_configuration_tells_how_many_numbers_a_capacity_keeps(capacity: Capacity) -> None:
    layer = random_layer(0, capacity=capacity, **SIZES)
    randomise(layer, 0)
    kept = sum(p.numel() for p in layer.router.capacity.parameters())
    assert capacity.state_size(layer.config.n_choices) == kept
