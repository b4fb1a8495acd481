"""Routing by token id, by task, and by projection equals the plain loops, and keeps to what each promises."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, seeds
from torch import Tensor

from moekit.config.balance import BiasBalance, RouterZLoss
from moekit.config.capacity import ExpertCapacity
from moekit.config.errors import ConfigError, InputError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import HashRouting, ProjectionRouting, TaskRouting
from moekit.model.transformer import Transformer
from moekit.moe.layer import MoE
from moekit.moe.selection import build_selection
from moekit.tensors.fp8 import round_rows
from oracle.compare import relative_error
from oracle.mixture import weighted_experts
from oracle.special import balanced_table, hash_gates, mixed_expert, projection_gates, task_gates

WIDTH = 6
SMALL = {"width": WIDTH, "expert_width": 5, "n_shared": 0}


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=generator(seed))


def steer(layer: MoE, seed: int, strength: float = 1.0) -> Tensor:
    """Give the layer a selection bias."""
    bias = layer.balance["bias"].selection_bias
    bias.data.copy_(strength * torch.randn(bias.shape, generator=generator(seed)))
    return bias.detach()


def gradients(layer: MoE, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of everything that learns, and of the input, in a fixed direction."""
    weights = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    direction = torch.randn(y.shape, generator=generator(9))
    return dict(zip(weights, torch.autograd.grad(y, list(weights.values()), direction), strict=True))


# --- hash


def hash_layer(n_ids: int, n_experts: int, top_k: int, seed: int = 0, **settings: Any) -> MoE:
    rule = HashRouting(vocab_size=n_ids, seed=seed, **settings)
    return random_layer(seed, n_routed=n_experts, top_k=top_k, routing=rule, **SMALL)


def rows(layer: MoE) -> list[list[int]]:
    return [[int(expert) for expert in row] for row in layer.router.rule.table.tolist()]


@given(seeds, st.integers(1, 9), st.integers(1, 40), st.sampled_from([0, 1, 7]), st.data())
def test_hash_routing_is_the_mean_of_the_experts_in_the_table(
    seed: int, n_experts: int, n_ids: int, n_tokens: int, data: st.DataObject
) -> None:
    layer = hash_layer(n_ids, n_experts, data.draw(st.integers(1, n_experts)), seed % 1000)
    x, ids = tokens(seed, n_tokens), torch.randint(n_ids, (n_tokens,), generator=generator(seed))
    y, routing = layer(x, ids=ids)
    gates = [hash_gates(rows(layer)[token], n_experts) for token in ids]
    assert routing.scores.tolist() == [[float(gate) for gate in token] for token in gates]
    assert routing.experts.tolist() == [rows(layer)[token] for token in ids]
    expected = [
        weighted_experts(u, g, layer.experts.gate_up, layer.experts.down) for u, g in zip(x, gates, strict=True)
    ]
    assert relative_error(y, torch.stack(expected) if expected else torch.zeros_like(x)) <= 1e-5


@given(seeds, st.integers(1, 9), st.data())
def test_a_balanced_table_is_the_greedy_one(seed: int, n_experts: int, data: st.DataObject) -> None:
    layer = hash_layer(25, n_experts, data.draw(st.integers(1, n_experts)), table="balanced")
    counts, before = data.draw(st.lists(st.integers(0, 9), min_size=25, max_size=25)), rows(layer)
    layer.router.rule.fill(torch.tensor(counts))
    assert rows(layer) == balanced_table([float(count) for count in counts], before, n_experts)


@given(st.lists(st.integers(0, 1000), min_size=200, max_size=200), st.integers(1, 16))
def test_a_balanced_table_gives_experts_equally_many_tokens(counts: list[int], n_experts: int) -> None:
    layer = hash_layer(200, n_experts, 1, table="balanced")
    layer.router.rule.fill(torch.tensor(counts))
    load = torch.zeros(n_experts).index_add_(0, layer.router.rule.table[:, 0].long(), torch.tensor(counts).float())
    assert load.max() - load.min() <= max(counts)


def test_filling_again_with_the_same_counts_changes_nothing() -> None:
    layer, counts = hash_layer(50, 4, 2, table="balanced"), torch.rand(50)
    layer.router.rule.fill(counts)
    before = rows(layer)
    layer.router.rule.fill(3 * counts)
    assert rows(layer) == before


def test_a_random_table_follows_the_seed_and_prefers_no_expert() -> None:
    table, same, other = (hash_layer(20_000, 8, 3, seed).router.rule.table for seed in (0, 0, 1))
    assert torch.equal(table, same) and not torch.equal(table, other)
    assert all(len(set(row)) == 3 for row in table.tolist())
    counts = torch.bincount(table.flatten().long(), minlength=8)
    assert (counts - 7500).abs().max() < 5 * 7500**0.5


def test_all_layers_of_a_model_share_one_table() -> None:
    config = ModelConfig(vocab_size=30, n_layers=3, moe=MoEConfig(n_routed=8, top_k=2, routing=HashRouting()))
    one, two = (layer.router.rule.table for layer in Transformer(config).moe_layers())
    assert one.shape == (30, 2)
    assert torch.equal(one, two)


def test_hash_routing_says_what_it_lacks() -> None:
    layer = hash_layer(10, 4, 2)
    with pytest.raises(InputError, match="needs the token ids"):
        layer(tokens(0, 3))
    with pytest.raises(InputError, match="token id 10 is not in the table"):
        layer(tokens(0, 2), ids=torch.tensor([9, 10]))
    with pytest.raises(ConfigError, match="vocab_size"):
        MoE(MoEConfig(routing=HashRouting(), **SMALL))


# --- task


class Tasks(NamedTuple):
    """Numbers of a layer with tasks."""

    n_tasks: int
    n_common: int
    owned: int
    top_k: int
    renormalise: bool

    def layer(self, seed: int, **settings: Any) -> MoE:
        rule = TaskRouting(n_tasks=self.n_tasks, n_common=self.n_common, renormalise=self.renormalise)
        n_routed = self.n_common + self.n_tasks * self.owned
        return random_layer(seed, n_routed=n_routed, top_k=self.top_k, routing=rule, **SMALL | settings)

    def others(self, task: int) -> list[int]:
        """The experts of all other tasks."""
        every = range(self.n_common, self.n_common + self.n_tasks * self.owned)
        return [i for i in every if (i - self.n_common) // self.owned != task]


@st.composite
def task_numbers(draw: st.DrawFn) -> Tasks:
    n_common, owned = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any))
    return Tasks(draw(st.integers(1, 4)), n_common, owned, draw(st.integers(1, n_common + owned)), draw(st.booleans()))


FOUR = Tasks(n_tasks=4, n_common=2, owned=3, top_k=3, renormalise=True)


@given(seeds, task_numbers(), st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.0, 1.0, 100.0]))
def test_task_routing_is_top_k_among_the_common_and_the_own(
    seed: int, numbers: Tasks, n_sequences: int, length: int, strength: float
) -> None:
    layer = numbers.layer(seed, balance=(BiasBalance(),))
    bias, x = steer(layer, seed, strength), tokens(seed, n_sequences, length)
    tasks = torch.randint(numbers.n_tasks, (n_sequences,), generator=generator(seed))
    y, routing = layer(x, tasks=tasks)
    assert routing.experts.shape == (n_sequences * length, numbers.top_k)
    for t, u in enumerate(x.flatten(0, 1)):
        task = int(tasks[t // length])
        logits = list(layer.router.centroids @ u)
        gates = task_gates(logits, bias.tolist(), task, *numbers[1:])
        dense = torch.zeros(len(gates)).scatter(0, routing.experts[t], routing.weights[t])
        torch.testing.assert_close(dense, torch.stack(gates), rtol=1e-4, atol=1e-6)
        expected = weighted_experts(u, gates, layer.experts.gate_up, layer.experts.down)
        torch.testing.assert_close(y.flatten(0, 1)[t], expected, rtol=1e-3, atol=1e-4)
        assert not routing.scores[t, numbers.others(task)].any()


@given(seeds, st.integers(0, 3))
def test_a_task_teaches_nothing_to_the_experts_and_centroids_of_others(seed: int, task: int) -> None:
    layer = FOUR.layer(seed, balance=(BiasBalance(), RouterZLoss()))
    steer(layer, seed, 1000.0)
    x = tokens(seed, 2, 5).requires_grad_()
    y, routing = layer(x, tasks=torch.tensor([task, task]))
    z_loss = layer.balance["z_loss"].loss(routing)
    assert z_loss.isfinite()
    found = gradients(layer, y + z_loss, x)
    others, own = FOUR.others(task), [i for i in range(14) if i not in FOUR.others(task)]
    assert all(gradient.isfinite().all() for gradient in found.values())
    for name in ("experts.gate_up", "experts.down", "router.centroids"):
        assert not found[name][others].any(), name
    assert found["router.centroids"][own].any(dim=-1).all()


def test_each_sequence_has_its_own_task() -> None:
    layer, x = FOUR.layer(0), tokens(0, 1, 5)
    y = layer(x.expand(4, -1, -1), tasks=torch.arange(4)).y
    for task in range(4):
        torch.testing.assert_close(y[task], layer(x, tasks=torch.tensor([task])).y[0])
    assert not any(torch.allclose(y[a], y[b]) for a in range(4) for b in range(a))


def test_task_routing_says_what_it_lacks() -> None:
    layer, x = FOUR.layer(0), tokens(0, 2, 3)
    with pytest.raises(InputError, match="needs the task of each sequence"):
        layer(x)
    for wrong in (-1, 4):
        with pytest.raises(InputError, match=f"task {wrong} is not one"):
            layer(x, tasks=torch.tensor([0, wrong]))
    one = FOUR._replace(n_tasks=1).layer(0)
    assert torch.equal(one(x).y, one(x, tasks=torch.zeros(2, dtype=torch.long)).y)


# --- projection


def projection_layer(seed: int, n_experts: int, top_k: int, dtype: torch.dtype = torch.float32, **settings: Any) -> MoE:
    rule = ProjectionRouting(renormalise=settings.pop("renormalise", True))
    return random_layer(seed, dtype, n_routed=n_experts, top_k=top_k, routing=rule, **SMALL | settings)


def by_loops(layer: MoE, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T D] in float32."""
    offsets = [0.0] * layer.config.n_choices if bias is None else bias.tolist()
    renormalise, top_k = layer.config.routing.renormalise, layer.config.top_k
    centroids, *stacks = (p.float() for p in (layer.router.centroids, layer.experts.gate_up, layer.experts.down))
    out = [
        mixed_expert(u, projection_gates(list(centroids @ u), offsets, top_k, renormalise), *stacks) for u in x.float()
    ]
    return torch.stack(out) if out else torch.zeros_like(x)


sizes = st.integers(1, 6).flatmap(lambda n_experts: st.tuples(st.just(n_experts), st.integers(1, n_experts)))


@given(seeds, sizes, st.sampled_from([0, 1, 9]), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_projection_routing_equals_the_plain_loop(
    seed: int, size: tuple[int, int], n_tokens: int, renormalise: bool, strength: float
) -> None:
    layer = projection_layer(seed, *size, renormalise=renormalise, balance=(BiasBalance(),))
    bias, x = steer(layer, seed, strength), tokens(seed, n_tokens)
    assert relative_error(layer(x).y, by_loops(layer, x, bias)) <= 1e-4


@given(seeds, sizes, st.booleans())
def test_the_gradients_of_projection_routing_equal_those_of_the_plain_loop(
    seed: int, size: tuple[int, int], renormalise: bool
) -> None:
    layer = projection_layer(seed, *size, renormalise=renormalise)
    x = tokens(seed, 7).requires_grad_()
    mine, theirs = gradients(layer, layer(x).y, x), gradients(layer, by_loops(layer, x), x)
    for name in mine:
        scale = theirs[name].abs().max().clamp_min(theirs["x"].abs().max() * 1e-3)
        assert (mine[name] - theirs[name]).abs().max() <= 1e-4 * scale, name


@given(seeds)
def test_projection_routing_in_bfloat16_is_right_to_its_rounding(seed: int) -> None:
    layer = projection_layer(seed, 5, 2, torch.bfloat16)
    x = tokens(seed, 9).to(torch.bfloat16)
    y = layer(x).y
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), by_loops(layer, x)) <= 2**-5
    y.float().sum().backward()
    assert layer.experts.down.grad.dtype == torch.bfloat16


def test_a_row_lists_gates_then_ups_then_downs() -> None:
    routing = projection_layer(0, 5, 2)(tokens(0, 20)).routing
    assert routing.scores.shape == (20, 15)
    assert (routing.experts // 5).tolist() == [[0, 0, 1, 1, 2, 2]] * 20
    torch.testing.assert_close(routing.weights.view(20, 3, 2).sum(dim=-1), torch.ones(20, 3))
    torch.testing.assert_close(routing.scores.view(20, 3, 5).sum(dim=-1), torch.ones(20, 3))


def test_a_gate_an_up_and_a_down_of_one_expert_are_that_expert() -> None:
    layer = projection_layer(0, 5, 1, balance=(BiasBalance(),))
    layer.balance["bias"].selection_bias.data[[3, 5 + 3, 10 + 3]] = 10.0
    x = tokens(0, 8)
    only = [torch.tensor(float(i == 3)) for i in range(5)]
    expected = torch.stack([weighted_experts(u, only, layer.experts.gate_up, layer.experts.down) for u in x])
    assert relative_error(layer(x).y, expected) <= 1e-5


def test_a_place_that_is_not_served_adds_nothing() -> None:
    layer = projection_layer(0, 4, 2)
    x = tokens(0, 6)
    routing = layer(x).routing
    served = routing.experts.clone()
    served[:, [1, 2, 5]] = -1
    y = layer.router.rule.combine(x, routing._replace(served=served), layer.experts)
    stacks = layer.experts.gate_up, layer.experts.down
    for t, u in enumerate(x):
        gates = [[torch.tensor(0.0)] * 4 for _ in range(3)]
        for place in (0, 3, 4):
            expert = int(routing.experts[t, place])
            gates[expert // 4][expert % 4] = routing.weights[t, place]
        torch.testing.assert_close(y[t], mixed_expert(u, gates, *stacks), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropped", ["residual", "next_best"])
def test_projection_routing_keeps_its_columns_under_a_capacity(dropped: str) -> None:
    layer = projection_layer(0, 4, 2, capacity=ExpertCapacity(factor=0.5, dropped=dropped), n_shared=1).train()
    y, routing = layer(tokens(0, 3, 8))
    column = torch.tensor([0, 0, 1, 1, 2, 2])
    assert (routing.served < 0).any()
    assert ((routing.served // 4 == column) | (routing.served < 0)).all()
    assert y.isfinite().all()


def test_projection_routing_has_as_many_expert_parameters_as_experts() -> None:
    plain = MoE(MoEConfig(n_routed=4, top_k=2, **SMALL))
    mixed = MoE(MoEConfig(n_routed=4, top_k=2, routing=ProjectionRouting(), **SMALL))
    count = [sum(p.numel() for p in layer.experts.parameters()) for layer in (plain, mixed)]
    assert count[0] == count[1]
    assert mixed.router.centroids.shape == (12, WIDTH)


def test_dropout_of_projection_routing_is_that_of_the_inner_numbers() -> None:
    layer = projection_layer(0, 4, 2, expert_dropout=0.5, expert_width=64).train()
    layer.experts.down.data.fill_(1.0)
    x = tokens(0, 200)
    one, same = (layer(x, generator=generator(3)).y for _ in range(2))
    assert torch.equal(one, same)
    whole = layer.eval()(x).y
    layer.train()
    mean = torch.stack([layer(x, generator=generator(seed)).y for seed in range(300)]).mean(dim=0)
    assert not torch.allclose(one, whole, rtol=0.05)
    assert relative_error(mean, whole) <= 0.1


def test_of_stored_experts_only_those_that_tokens_come_to_are_read() -> None:
    layer, x, known = projection_layer(0, 9, 1), tokens(0, 2), set()
    with torch.no_grad():
        expected, routing = layer(x)
        stacks = layer.experts.gate_up, layer.experts.down
        layer.experts.stored = lambda i: known.add(i) or (stacks[0][i], stacks[1][i])
        assert torch.equal(layer(x).y, expected)
    assert known == {expert % 9 for expert in routing.experts.flatten().tolist()}
    known.clear()
    layer(x).y.sum().backward()
    assert not known
    assert layer.experts.gate_up.grad.any()


def test_simulated_fp8_rounds_the_inputs_of_all_three_products() -> None:
    layer, x = projection_layer(0, 4, 2), tokens(0, 20)
    routing = layer(x).routing
    plain = layer.router.rule.combine(x, routing, layer.experts)
    layer.experts.round_inner = round_rows
    y = layer.router.rule.combine(x, routing, layer.experts)
    assert torch.equal(y, layer.router.rule.combine(round_rows(x), routing, layer.experts))
    layer.experts.round_inner = lambda h: round_rows(h) if h.shape[-1] == WIDTH else h
    assert not torch.equal(y, layer.router.rule.combine(x, routing, layer.experts))
    assert 1e-3 < relative_error(y, plain) < 0.2


def test_rounding_passes_gradients_of_projection_routing_straight_through() -> None:
    layer, x = projection_layer(0, 4, 2), tokens(0, 20).requires_grad_()
    plain = gradients(layer, layer(x).y, x)
    layer.experts.round_inner = lambda h: h.detach().clone()
    rounded = gradients(layer, layer(x).y, x)
    assert all(torch.equal(plain[name], rounded[name]) for name in plain)


@pytest.mark.parametrize("rule", [HashRouting(vocab_size=9), TaskRouting(n_tasks=3, n_common=2), ProjectionRouting()])
def test_a_rule_without_its_layer_counts_its_parameters(rule: Any) -> None:
    config = MoEConfig(width=WIDTH, n_routed=8, top_k=2, routing=rule)
    stored = sum(p.numel() for p in build_selection(config).parameters())
    assert stored == rule.extra_parameters(8, 2, WIDTH)
