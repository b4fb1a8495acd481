"""The whole layer equals the papers' equations, token by token, and is an ordinary module."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import generator, random_layer, seeds
from torch import Tensor

from moekit.config.balance import BiasBalance
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.moe.layer import MoE
from oracle.compare import relative_error
from oracle.gates import deepseek_moe_gates, deepseek_v2_gates, deepseek_v3_gates, mixtral_gates
from oracle.mixture import Gates, mixture, swiglu

V3 = TopKRouting(
    score="sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, n_groups=4, top_k_groups=2, group_score="top2_sum"
)
FAMILIES = {
    "deepseek-moe": ({"n_routed": 8, "top_k": 3, "n_shared": 2}, partial(deepseek_moe_gates, top_k=3)),
    "deepseek-v2": (
        {"n_routed": 8, "top_k": 3, "routing": TopKRouting(scale=16.0, n_groups=4, top_k_groups=2)},
        partial(deepseek_v2_gates, top_k=3, n_devices=4, max_devices=2, scale=16.0),
    ),
    "deepseek-v3": (
        {"n_routed": 8, "top_k": 3, "routing": V3},
        partial(deepseek_v3_gates, bias=[0.0] * 8, top_k=3, n_nodes=4, max_nodes=2, scale=2.5),
    ),
    "mixtral": (
        {"n_routed": 8, "top_k": 2, "n_shared": 0, "routing": TopKRouting(order="top_k_then_score")},
        partial(mixtral_gates, top_k=2),
    ),
    "one expert": ({"n_routed": 1, "top_k": 1}, partial(deepseek_moe_gates, top_k=1)),
    "every expert": ({"n_routed": 4, "top_k": 4}, partial(deepseek_moe_gates, top_k=4)),
}
SMALL = {"width": 6, "expert_width": 5, "n_routed": 8, "top_k": 3, "n_shared": 2}


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def by_the_paper(layer: MoE, x: Tensor, gates: Gates) -> Tensor:
    """[T D] through the layer's weights, in float32."""
    y = mixture(x, layer.router.centroids.float(), gates, layer.experts.gate_up.float(), layer.experts.down.float())
    if layer.shared is not None:
        y = y + torch.stack(
            [swiglu(u, layer.shared.gate_up.weight.float(), layer.shared.down.weight.float()) for u in x]
        )
    return y


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=seeds, n_tokens=st.integers(1, 9), width=st.integers(1, 12), expert_width=st.integers(1, 12))
def test_the_layer_equals_its_paper(family: str, seed: int, n_tokens: int, width: int, expert_width: int) -> None:
    settings, gates = FAMILIES[family]
    layer = random_layer(seed, width=width, expert_width=expert_width, **settings)
    x = tokens(seed, n_tokens, width)
    assert relative_error(layer(x).y, by_the_paper(layer, x, gates)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=seeds)
def test_the_gradients_of_all_weights_equal_those_of_the_paper(family: str, seed: int) -> None:
    settings, gates = FAMILIES[family]
    layer = random_layer(seed, width=6, expert_width=5, **settings)
    weights = dict(layer.named_parameters())
    x = tokens(seed, 7, 6).requires_grad_()
    direction = tokens(seed + 1, 7, 6)
    inputs = [x, *weights.values()]
    mine = torch.autograd.grad(layer(x).y, inputs, direction)
    theirs = torch.autograd.grad(by_the_paper(layer, x, gates), inputs, direction)
    for name, one, other in zip(("x", *weights), mine, theirs, strict=True):
        # With one expert the weight is always 1: what is left of the router's gradient is rounding.
        if family == "one expert" and name == "router.centroids":
            assert one.abs().max() < 1e-5
        else:
            assert relative_error(one, other) <= 1e-4, name


@given(seed=seeds)
def test_the_layer_in_bfloat16_is_right_to_its_rounding(seed: int) -> None:
    layer = random_layer(seed, torch.bfloat16, **SMALL)
    x = tokens(seed, 9, 6).to(torch.bfloat16)
    y = layer(x).y
    assert y.dtype == torch.bfloat16
    expected = by_the_paper(layer, x.float(), partial(deepseek_moe_gates, top_k=3))
    assert relative_error(y, expected) <= 2**-6


def test_a_layer_in_bfloat16_routes_in_float32() -> None:
    layer = random_layer(0, torch.bfloat16, balance=(BiasBalance(),), **SMALL)
    routing = layer(tokens(0, 9, 6).to(torch.bfloat16)).routing
    assert {routing.logits.dtype, routing.scores.dtype, routing.weights.dtype} == {torch.float32}
    assert layer.balance["bias"].bias().dtype == torch.float32


def test_the_logits_of_a_bfloat16_layer_are_not_rounded_to_bfloat16() -> None:
    layer = random_layer(0, torch.bfloat16, **SMALL)
    x = tokens(0, 9, 6).to(torch.bfloat16)
    logits = layer(x).routing.logits
    assert relative_error(logits.detach(), (x.double() @ layer.router.centroids.double().T).detach()) <= 1e-6


def test_the_router_stays_in_float32_under_autocast() -> None:
    layer = random_layer(0, **SMALL)
    x = tokens(0, 9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = layer.router(x)
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.logits, layer.router(x).logits)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6), (2, 0, 6), (0, 5, 6), (0, 6)])
def test_tokens_of_any_leading_shape_come_back_in_that_shape(shape: tuple[int, ...]) -> None:
    layer = random_layer(0, **SMALL)
    x = tokens(0, *shape)
    y, routing = layer(x)
    assert y.shape == x.shape
    assert relative_error(y.reshape(-1, 6), layer(x.reshape(-1, 6)).y) <= 1e-6
    assert routing.n_sequences >= 1


def test_the_dimension_before_the_last_is_the_sequence() -> None:
    layer = random_layer(0, **SMALL)
    assert layer(tokens(0, 3, 5, 6)).routing.n_sequences == 3
    assert layer(tokens(0, 2, 3, 5, 6)).routing.n_sequences == 6
    assert layer(tokens(0, 5, 6)).routing.n_sequences == 1


def test_a_mask_changes_what_is_counted_and_not_the_output() -> None:
    layer = random_layer(0, **SMALL)
    x = tokens(0, 2, 5, 6)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    plain, masked = layer(x), layer(x, mask)
    assert torch.equal(plain.y, masked.y)
    assert torch.equal(masked.routing.mask, mask.flatten())


def test_no_tokens_pass_forward_and_backward() -> None:
    layer = random_layer(0, **SMALL)
    layer(torch.zeros(0, 6)).y.sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.parameters())


def test_equal_centroids_still_give_each_token_distinct_experts() -> None:
    layer = random_layer(0, **SMALL)
    layer.router.centroids.data.zero_()
    experts = layer(tokens(0, 20, 6)).routing.experts
    assert all(len(set(chosen)) == 3 for chosen in experts.tolist())


def test_the_shared_block_is_scaled_by_its_gate() -> None:
    layer = random_layer(0, shared_gate=True, **SMALL)
    x = tokens(0, 4, 6)
    routed = mixture(
        x, layer.router.centroids, partial(deepseek_moe_gates, top_k=3), layer.experts.gate_up, layer.experts.down
    )
    gate = torch.sigmoid(x @ layer.shared_gate.weight.T)
    assert relative_error(layer(x).y, routed + gate * layer.shared(x)) <= 1e-5


def test_shared_experts_are_one_block_as_wide_as_all_of_them() -> None:
    assert random_layer(0, **SMALL).shared.down.weight.shape == (6, 2 * 5)


def test_the_selection_bias_reaches_the_choice() -> None:
    layer = random_layer(0, balance=(BiasBalance(),), **SMALL)
    layer.balance["bias"].bias().data[4] = 1e3
    assert (layer(tokens(0, 20, 6)).routing.experts == 4).any(dim=-1).all()


def test_a_layer_on_its_own_needs_a_width() -> None:
    with pytest.raises(ValueError, match="width"):
        MoE(MoEConfig())


def test_a_layer_is_built_without_memory_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = MoE(MoEConfig(balance=(BiasBalance(),), **SMALL))
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_a_layer_moved_from_meta_in_bfloat16_keeps_its_bias_in_float32() -> None:
    with torch.device("meta"):
        layer = MoE(MoEConfig(balance=(BiasBalance(),), **SMALL))
    layer = layer.to(torch.bfloat16).to_empty(device="cpu")
    assert layer.balance["bias"].bias().dtype == torch.float32
    assert layer.experts.down.dtype == torch.bfloat16
