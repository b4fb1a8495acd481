"""A layer keeps the job of its last few tokens: whatever is changed in it afterwards must be heard by the next call."""

import copy
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.kernels import few_rows
from moekit.moe.balance import steering
from moekit.moe.layer import MoE
from moekit.moe.router import Router
from moekit.moe.state import state
from moekit.moe.swiglu import SwiGLU

CONFIG = MoEConfig(width=64, expert_width=64, n_routed=8, n_shared=1, top_k=3, balance=(BiasBalance(),))
pytestmark = pytest.mark.skipif(not few_rows.runs_here(), reason="no compiled kernels on this machine")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer_of(seed: int, config: MoEConfig = CONFIG) -> MoE:
    layer = MoE(config).bfloat16().eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(0.2 * drawn(seed, *parameter.shape))
    return layer


def keeps(layer: MoE, x: Tensor) -> bool:
    return layer._kept.known(layer, x, steering(layer.balance)) is not None


def shared(layer: MoE) -> SwiGLU:
    assert layer.shared is not None
    return layer.shared


def centroids(layer: MoE) -> nn.Parameter:
    assert layer.router.centroids is not None
    return layer.router.centroids


def replaced(tensor: Tensor, seed: int = 9) -> nn.Parameter:
    return nn.Parameter(0.2 * drawn(seed, *tensor.shape), requires_grad=False)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def another_centroids(layer: MoE) -> None:
    layer.router.centroids = replaced(centroids(layer))


def other_data(layer: MoE) -> None:
    layer.experts.down.data = replaced(layer.experts.down).data


def turned_data(layer: MoE) -> None:
    down = shared(layer).down.weight
    assert down.shape[0] == down.shape[1]
    down.data = down.data.t()


def fewer_experts(layer: MoE) -> None:
    centroids(layer).data = centroids(layer).data[:5]
    layer.balance["bias"].selection_bias = state(torch.zeros(5))


def written_in_place(layer: MoE) -> None:
    layer.experts.gate_up.mul_(-1)


def loaded(layer: MoE) -> None:
    layer.load_state_dict(layer_of(5).state_dict())


def bias_moved(layer: MoE) -> None:
    layer.balance["bias"].selection_bias.copy_(torch.linspace(-9, 9, 8))


def bias_replaced(layer: MoE) -> None:
    layer.balance["bias"].selection_bias = state(torch.linspace(9, -9, 8))


def without_rules(layer: MoE) -> None:
    bias_moved(layer)
    layer(drawn(1, 1, 64))
    layer.balance = nn.ModuleDict()


def another_router(layer: MoE) -> None:
    layer.router = copy.deepcopy(layer.router)
    layer.router.centroids = replaced(centroids(layer))


def another_rule(layer: MoE) -> None:
    layer.router.rule = Router(MoEConfig(width=64, expert_width=64, n_routed=8, top_k=2)).rule


def without_shared(layer: MoE) -> None:
    layer.shared = None


def with_parametrization(layer: MoE) -> None:
    parametrize.register_parametrization(shared(layer).down, "weight", Doubled())


def inner_rounded(layer: MoE) -> None:
    layer.experts.round_inner = torch.zeros_like


CHANGES = [
    another_centroids,
    other_data,
    turned_data,
    fewer_experts,
    written_in_place,
    loaded,
    bias_moved,
    bias_replaced,
    without_rules,
    another_router,
    another_rule,
    without_shared,
    with_parametrization,
    inner_rounded,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_change_is_heard_by_the_next_call(change: Callable[[MoE], None]) -> None:
    layer, x = layer_of(0), drawn(1, 1, 64)
    before = layer(x)
    assert keeps(layer, x)
    change(layer)
    found = layer(x)
    fresh = copy.deepcopy(layer)
    assert not keeps(fresh, x)
    expected = fresh(x)
    assert torch.equal(found.y, expected.y)
    assert all(map(torch.equal, found.routing[:4], expected.routing[:4]))
    assert not torch.equal(found.y, before.y)


@pytest.mark.parametrize("listener", ["router", "router.rule", "experts", "shared", "shared.down"])
@torch.no_grad()
def test_who_comes_to_listen_later_hears_it(listener: str) -> None:
    layer, x = layer_of(0), drawn(1, 1, 64)
    layer(x)
    heard = []
    handle = layer.get_submodule(listener).register_forward_pre_hook(lambda *_: heard.append(listener))
    layer(x)
    assert not keeps(layer, x)
    assert listener == "router.rule" or heard == [listener]
    handle.remove()
    layer(x)
    assert keeps(layer, x)


@torch.no_grad()
def test_who_listens_to_the_layer_itself_needs_no_other_job() -> None:
    layer, x = layer_of(0), drawn(1, 1, 64)
    expected, heard = layer(x).y, []
    layer.register_forward_hook(lambda *_: heard.append("layer"))
    assert torch.equal(layer(x).y, expected)
    assert heard == ["layer"]
    assert keeps(layer, x)


@torch.no_grad()
def test_calls_that_differ_get_jobs_of_their_own() -> None:
    layer = layer_of(0)
    rows = drawn(1, 8, 64)
    inputs = [rows[:1], rows[:5], rows[2:3], rows[:2].unsqueeze(0), rows]
    expected = [layer_of(0)(x) for x in inputs]
    for _ in range(2):
        found = [layer(x) for x in inputs]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.y, other.y)
            assert all(map(torch.equal, one.routing[:4], other.routing[:4]))


@torch.no_grad()
def test_what_steers_the_choice_anew_each_time_is_followed() -> None:
    layer = layer_of(0, replace(CONFIG, balance=(BiasBalance(update="multiplicative"),)))
    x = drawn(1, 1, 64)
    for step in range(6):
        layer.balance["bias"].selection_bias.copy_(torch.linspace(-1, 1, 8).roll(step))
        assert torch.equal(layer(x).y, copy.deepcopy(layer)(x).y)
        assert layer._kept._last is None


@torch.no_grad()
def test_copies_keep_nothing_of_the_original() -> None:
    layer, x = layer_of(0), drawn(1, 1, 64)
    expected = layer(x).y
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.experts.down.zero_()
        assert torch.equal(other(x).y, expected)
        layer.experts.down.copy_(other.experts.down)


@torch.no_grad()
def test_no_weight_is_kept_alive() -> None:
    layer = layer_of(0)
    layer(drawn(1, 1, 64))
    kept = [weakref.ref(each) for part in (layer.router, layer.experts, shared(layer)) for each in part.parameters()]
    assert len(kept) == 5
    layer.experts, layer.router, layer.shared = nn.Identity(), nn.Identity(), nn.Identity()
    assert all(each() is None for each in kept)
