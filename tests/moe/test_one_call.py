"""A few tokens through a whole layer in one call of compiled code get what the layer's parts give them one by one."""

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moekit.config.balance import BiasBalance
from moekit.config.capacity import ExpertCapacity
from moekit.config.moe import MoEConfig
from moekit.config.quantisation import Groups
from moekit.config.routing import NullRouting, TopKRouting
from moekit.kernels import few_rows
from moekit.kernels.groups import quantise
from moekit.kernels.linear import MOST, Linear
from moekit.moe.experts import Experts
from moekit.moe.layer import MoE, MoEOutput
from moekit.moe.routing import Routing
from moekit.moe.swiglu import SwiGLU
from oracle.compare import relative_error

seeds = st.integers(0, 2**31 - 1)
formats = st.sampled_from([None, Groups(4, 32), Groups(8, 32), Groups(4, 64), Groups(8, 64)])
ROUTINGS = (
    TopKRouting(),
    TopKRouting(score="sigmoid", renormalise=True, scale=2.5),
    TopKRouting(score="sqrt_softplus", renormalise=True, epsilon=0.5),
    TopKRouting(order="top_k_then_score", renormalise=True),
    TopKRouting(score="sigmoid", n_groups=3, top_k_groups=2, group_score="top2_sum", renormalise=True, epsilon=1e-20),
    TopKRouting(n_groups=2, top_k_groups=1),
)
CONFIG = {"width": 64, "expert_width": 64, "n_routed": 6, "top_k": 3}
needs_kernels = pytest.mark.skipif(not few_rows.runs_here(), reason="no compiled kernels on this machine")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantised(module: Experts | Linear, name: str, groups: Groups | None) -> None:
    """Put the bytes of a matrix, or of a stack of them, in its place."""
    if groups is not None:
        rows = quantise(getattr(module, name).detach().float(), groups.bits, groups.size).rows
        module.groups = groups
        setattr(module, name, nn.Parameter(rows, requires_grad=False))


def layer_of(config: MoEConfig, seed: int, routed: Groups | None, shared: tuple[Groups | None, Groups | None]) -> MoE:
    layer = MoE(config).bfloat16().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2, generator=generator(seed))
    quantised(layer.experts, "gate_up", routed)
    quantised(layer.experts, "down", routed)
    if layer.shared is not None:
        quantised(layer.shared.gate_up, "weight", shared[0])
        quantised(layer.shared.down, "weight", shared[1])
    return layer


class OnDisk:
    """A layer's experts as if they were read one by one."""

    def __init__(self, experts: Experts) -> None:
        self.stacks = experts.gate_up.clone(), experts.down.clone()
        self.shapes = [tuple(stack.shape[1:]) for stack in self.stacks]
        self.dtype = self.stacks[0].dtype
        self.addresses = array("q", bytes(16 * len(self.stacks[0])))
        self.asked: list[int] = []

    def __call__(self, expert: int) -> tuple[Tensor, Tensor]:
        self.asked.append(expert)
        found = self.stacks[0][expert], self.stacks[1][expert]
        for which, matrix in enumerate(found):
            self.addresses[2 * expert + which] = matrix.data_ptr()
        return found


def plain(layer: MoE, x: Tensor, routing: Routing | None = None) -> MoEOutput:
    """The layer's output in plain torch, by a routing that is given."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(few_rows, "library", lambda: None)
        if routing is not None:
            patched.setattr(layer.router, "forward", lambda *_: routing)
        return layer(x)


@needs_kernels
@given(
    seed=seeds,
    n_tokens=st.integers(1, MOST),
    n_shared=st.integers(0, 2),
    gated=st.booleans(),
    biased=st.booleans(),
    routing=st.sampled_from(ROUTINGS),
    routed=formats,
    shared=st.tuples(formats, formats),
    on_disk=st.booleans(),
)
@torch.inference_mode()
def test_a_layer_in_one_call_equals_its_parts(
    seed: int,
    n_tokens: int,
    n_shared: int,
    gated: bool,
    biased: bool,
    routing: TopKRouting,
    routed: Groups | None,
    shared: tuple[Groups | None, Groups | None],
    on_disk: bool,
) -> None:
    balance = (BiasBalance(),) if biased else ()
    gate = gated and n_shared > 0
    config = MoEConfig(**CONFIG, n_shared=n_shared, shared_gate=gate, routing=routing, balance=balance)
    layer = layer_of(config, seed, routed, shared)
    if on_disk:
        layer.experts.stored = OnDisk(layer.experts)
    x = torch.randn(1, n_tokens, 64, generator=generator(seed)).bfloat16()
    if routed is not None:
        assert layer._in_one_call(x[0], 1, None) is not None
    found = layer(x)
    # A choice may fall otherwise where two experts are equally good to the rounding: the routing is taken as it is.
    expected = plain(layer, x, found.routing)
    assert relative_error(found.y, expected.y) < 2e-2
    itself = plain(layer, x).routing
    assert relative_error(found.routing.logits, itself.logits) < 1e-5
    assert relative_error(found.routing.scores, itself.scores) < 1e-5
    alike = (found.routing.experts == itself.experts).all(dim=-1)
    assert alike.float().mean() >= (n_tokens - 1) / n_tokens
    assert torch.allclose(found.routing.weights[alike], itself.weights[alike], rtol=1e-4)


@needs_kernels
@given(seed=seeds, n_tokens=st.integers(1, MOST))
@torch.inference_mode()
def test_rules_without_a_way_take_the_long_one(seed: int, n_tokens: int) -> None:
    layer = layer_of(MoEConfig(**CONFIG, routing=NullRouting(n_null=4)), seed, Groups(4, 32), (None, None))
    x = torch.randn(1, n_tokens, 64, generator=generator(seed)).bfloat16()
    assert layer._in_one_call(x[0], 1, None) is None
    found = layer(x)
    assert relative_error(found.y, plain(layer, x, found.routing).y) < 2e-2


@needs_kernels
@given(seed=seeds, rows=st.integers(1, 2 * MOST), first=formats, second=formats, wide=st.booleans())
@torch.inference_mode()
def test_a_feed_forward_in_one_call_equals_its_parts(
    seed: int, rows: int, first: Groups | None, second: Groups | None, wide: bool
) -> None:
    block = SwiGLU(64, 64).requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, 0.2, generator=generator(seed))
    block = block if wide else block.bfloat16()
    quantised(block.gate_up, "weight", first)
    quantised(block.down, "weight", second)
    x = torch.randn(2, rows, 64, generator=generator(seed)).to(torch.float32 if wide else torch.bfloat16)
    found = block(x)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(few_rows, "library", lambda: None)
        expected = block(x)
    assert found.dtype == x.dtype
    assert relative_error(found, expected) < 2e-2


@needs_kernels
@torch.inference_mode()
def test_only_chosen_experts_are_asked_for() -> None:
    layer, x = layer_of(MoEConfig(**CONFIG, n_shared=1), 0, Groups(4, 32), (None, None)), torch.ones(2, 64).bfloat16()
    on_disk = layer.experts.stored = OnDisk(layer.experts)
    routing = layer(x).routing
    assert set(on_disk.asked) == set(routing.experts.flatten().tolist())
    layer(x)
    assert len(on_disk.asked) == len(set(on_disk.asked))


@needs_kernels
@pytest.mark.parametrize("listener", ["router", "experts", "shared", "shared.gate_up", "shared.down"])
@torch.inference_mode()
def test_who_listens_to_a_part_hears_it(listener: str) -> None:
    layer, x = layer_of(MoEConfig(**CONFIG, n_shared=1), 0, Groups(4, 32), (None, None)), torch.ones(2, 64).bfloat16()
    heard = []
    layer.get_submodule(listener).register_forward_hook(lambda *_: heard.append(listener))
    layer(x)
    assert heard == [listener]


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@needs_kernels
@pytest.mark.parametrize("name", ["router.centroids", "experts.gate_up", "shared.down.weight", "shared_gate.weight"])
@torch.no_grad()
def test_a_weight_that_is_made_for_each_call_is_no_place_in_memory(name: str) -> None:
    config = MoEConfig(**CONFIG, n_shared=1, shared_gate=True)
    halved, made = (layer_of(config, 0, None, (None, None)).requires_grad_(False) for _ in range(2))
    x = torch.randn(3, 64, generator=generator(0)).bfloat16()
    halved.get_parameter(name).div_(2)
    part, _, weight = name.rpartition(".")
    parametrize.register_parametrization(made.get_submodule(part), weight, Halved())
    assert made._in_one_call(x, 1, None) is None
    routing = halved(x).routing
    assert relative_error(made(x).routing.logits, routing.logits) < 1e-5
    assert relative_error(plain(made, x, routing).y, halved(x).y) < 2e-2


@needs_kernels
@torch.inference_mode()
def test_averaged_shared_experts_capacities_and_gradients_take_the_long_way() -> None:
    x = torch.ones(2, 64).bfloat16()
    plainest = layer_of(MoEConfig(**CONFIG, n_shared=1), 0, None, (None, None))
    assert plainest._in_one_call(x, 1, None) is not None
    with torch.enable_grad():
        assert plainest._in_one_call(x, 1, None) is None
    capacity = ExpertCapacity(in_evaluation=True)
    for option in ({"n_shared": 1, "shared_average": True}, {"capacity": capacity}):
        assert layer_of(MoEConfig(**CONFIG, **option), 0, None, (None, None))._in_one_call(x, 1, None) is None
