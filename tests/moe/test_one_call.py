"""A few tokens through a whole layer in one call of compiled code get what the layer's parts give them one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moekit.config.moe import MoEConfig
from moekit.config.quantisation import Groups
from moekit.config.routing import NullRouting, TopKRouting
from moekit.kernels import few_rows
from moekit.kernels.groups import quantise
from moekit.kernels.linear import MOST, Linear
from moekit.moe.experts import Experts
from moekit.moe.layer import MoE
from moekit.moe.swiglu import SwiGLU
from oracle.compare import relative_error

seeds = st.integers(0, 2**31 - 1)
formats = st.sampled_from([None, Groups(4, 32), Groups(8, 32), Groups(4, 64), Groups(8, 64)])
ROUTINGS = (TopKRouting(), TopKRouting(score="sigmoid", renormalise=True, scale=2.5), NullRouting(n_null=4))
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


def one_by_one(layer: MoE, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The layer's output in plain torch."""
    with monkeypatch.context() as patched:
        patched.setattr(few_rows, "library", lambda: None)
        return layer(x).y


@needs_kernels
@given(
    seed=seeds,
    n_tokens=st.integers(1, MOST),
    n_shared=st.integers(0, 2),
    gated=st.booleans(),
    routing=st.sampled_from(ROUTINGS),
    routed=formats,
    shared=st.tuples(formats, formats),
    one_by_one_from_disk=st.booleans(),
)
@torch.inference_mode()
def test_a_layer_in_one_call_equals_its_parts(
    seed: int,
    n_tokens: int,
    n_shared: int,
    gated: bool,
    routing: TopKRouting | NullRouting,
    routed: Groups | None,
    shared: tuple[Groups | None, Groups | None],
    one_by_one_from_disk: bool,
) -> None:
    config = MoEConfig(**CONFIG, n_shared=n_shared, shared_gate=gated and n_shared > 0, routing=routing)
    layer = layer_of(config, seed, routed, shared)
    experts = layer.experts
    if one_by_one_from_disk:
        stacks = experts.gate_up.clone(), experts.down.clone()
        experts.stored = lambda expert: (stacks[0][expert], stacks[1][expert])
    x = torch.randn(1, n_tokens, 64, generator=generator(seed)).bfloat16()
    monkeypatch = pytest.MonkeyPatch()
    chosen = layer.router(x[0])
    if routed is not None:
        assert layer._in_one_call(x[0], chosen) is not None
    # A choice may fall otherwise where two experts are equally good to the rounding: the routing is taken as it is.
    layer.router.forward = lambda *_: chosen
    assert relative_error(layer(x).y, one_by_one(layer, x, monkeypatch)) < 2e-2


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
    stacks, asked = (layer.experts.gate_up, layer.experts.down), set()

    def stored(expert: int) -> tuple[Tensor, Tensor]:
        asked.add(expert)
        return stacks[0][expert], stacks[1][expert]

    layer.experts.stored = stored
    routing = layer(x).routing
    assert asked == set(routing.experts.flatten().tolist())


@needs_kernels
@pytest.mark.parametrize("listener", ["experts", "shared", "shared.gate_up", "shared.down"])
@torch.inference_mode()
def test_who_listens_to_a_part_hears_it(listener: str) -> None:
    layer, x = layer_of(MoEConfig(**CONFIG, n_shared=1), 0, Groups(4, 32), (None, None)), torch.ones(2, 64).bfloat16()
    heard = []
    layer.get_submodule(listener).register_forward_hook(lambda *_: heard.append(listener))
    layer(x)
    assert heard == [listener]


@torch.inference_mode()
def test_averaged_shared_experts_and_dropped_places_take_the_long_way() -> None:
    layer, x = layer_of(MoEConfig(**CONFIG, n_shared=1, shared_average=True), 0, None, (None, None)), torch.ones(2, 64)
    routing = layer.router(x.bfloat16())
    assert layer._in_one_call(x.bfloat16(), routing) is None
    layer = layer_of(MoEConfig(**CONFIG, n_shared=1), 0, None, (None, None))
    assert layer._in_one_call(x.bfloat16(), routing._replace(served=routing.experts)) is None
    with torch.enable_grad():
        assert layer._in_one_call(x.bfloat16(), routing) is None
