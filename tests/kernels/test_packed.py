"""Without a compiler, torch's own product with 4-bit numbers gives what the restored matrix gives, in bfloat16."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moekit.config.quantisation import Groups
from moekit.kernels import packed
from moekit.kernels.few_rows import linear, linear_twin
from moekit.kernels.groups import GROUPS, Grouped, quantise_twin, restore
from moekit.kernels.linear import Linear
from moekit.kernels.packed import MOST, Copies, Packed, pack, product
from moekit.moe.experts import Experts

needs_avx = pytest.mark.skipif(
    (torch.backends.cpu.get_cpu_capability(), 4) not in MOST, reason="torch has no fast product on this processor"
)
pytestmark = [needs_avx, pytest.mark.usefixtures("without_kernels")]
once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(out: int, inputs: int, bits: int, group: int, seed: int = 0) -> Grouped:
    return quantise_twin(torch.randn(out, inputs, generator=generator(seed)), bits, group)


@once
@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(0, 20),
    out=st.integers(1, 12),
    groups=st.integers(1, 4),
    group=st.sampled_from(GROUPS),
    bits=st.sampled_from([4, 8]),
    heavy=st.booleans(),
)
def test_it_is_the_product_with_the_restored_matrix(
    seed: int, rows: int, out: int, groups: int, group: int, bits: int, heavy: bool
) -> None:
    source = generator(seed)
    weight = torch.randn(16 * out, groups * group, generator=source)
    weight = weight**5 if heavy else weight
    own = quantise_twin(weight, bits, group)
    x = torch.randn(rows, groups * group, generator=source).bfloat16()
    found, exact = product(x, pack(own)), x.double() @ restore(own).double().T
    # Scales, values of number 8, weights and products of parts are rounded to 8 bits, all within a group's extremes.
    extremes = restore(own).double().unflatten(-1, (-1, group)).abs().amax(dim=-1, keepdim=True)
    largest = x.double().abs() @ (3 * extremes).expand(-1, -1, group).flatten(-2).T
    assert found.shape == (rows, 16 * out)
    assert found.dtype == torch.float32
    assert bool(((found - exact).abs() <= 2**-8 * largest).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_its_error_is_that_of_a_matrix_in_bfloat16(bits: int) -> None:
    own, x = matrix(512, 1024, bits, 64), torch.randn(4, 1024, generator=generator(1)).bfloat16()
    exact = x.double() @ restore(own).double().T
    narrow = torch.nn.functional.linear(x, restore(own, torch.bfloat16)).double()
    assert (product(x, pack(own)) - exact).norm() < 1.2 * (narrow - exact).norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_of_rows_are_packed_as_all_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = matrix(64 * 3 + 48, 96, bits, 32)
    monkeypatch.setattr(packed, "NUMBERS", 1 << 30)
    whole = pack(own)
    monkeypatch.setattr(packed, "NUMBERS", 1)
    blocks = pack(own)
    pairs = zip(whole.parts, blocks.parts, strict=True)
    assert all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 1000])
def test_few_rows_take_the_copy_and_many_the_restored_matrix(bits: int, rows: int) -> None:
    own = matrix(32, 64, bits, 32)
    copied, x = pack(own), torch.randn(rows, 64, generator=generator(1))
    expected = product(x, copied) if copied.takes(rows) else linear_twin(x, own)
    assert torch.equal(linear(x, copied), expected)


def layer_of(own: Grouped) -> Linear:
    layer = Linear(own.inputs, len(own.rows), bias=False)
    layer.groups = Groups(own.bits, own.group)
    layer.weight = torch.nn.Parameter(own.rows.clone(), requires_grad=False)
    return layer


def test_a_layer_makes_one_copy_and_another_when_its_matrix_changes() -> None:
    first, second = matrix(16, 64, 4, 32, 1), matrix(16, 64, 4, 32, 2)
    layer = layer_of(first)
    x = torch.randn(1, 64, generator=generator(3)).bfloat16()
    copied = layer.held(layer.weight)
    assert isinstance(copied, Packed)
    with torch.inference_mode():
        found = layer(x)
        assert layer.held(layer.weight) is copied
    assert torch.equal(found, product(x, copied).bfloat16())
    with torch.no_grad():
        layer.weight.copy_(second.rows)
    assert torch.equal(layer(x), product(x, pack(second)).bfloat16())
    layer.weight = torch.nn.Parameter(first.rows.clone(), requires_grad=False)
    assert torch.equal(layer(x), found)


def test_a_copied_module_makes_copies_of_its_own() -> None:
    layer = layer_of(matrix(16, 64, 4, 32))
    layer.held(layer.weight)
    other = copy.deepcopy(layer)
    x = torch.randn(1, 64, generator=generator(3)).bfloat16()
    assert torch.equal(other(x), layer(x))
    assert other.copies is not layer.copies
    assert layer.state_dict().keys() == {"weight"}


def test_experts_are_copied_when_a_token_first_comes_to_them() -> None:
    layer = Experts(4, 64, 32).eval()
    layer.groups = Groups(4, 32)
    stacks = {name: getattr(layer, name).detach().normal_(generator=generator(5)) for name in ("gate_up", "down")}
    for name, stack in stacks.items():
        setattr(layer, name, torch.nn.Parameter(quantise_twin(stack, 4, 32).rows, requires_grad=False))
    gate_up, down = layer._quantised(2)
    assert isinstance(gate_up, Packed)
    assert isinstance(down, Packed)
    assert torch.equal(gate_up.source.rows, layer.gate_up[2])
    assert layer._quantised(2)[0] is gate_up
    assert layer._quantised(1)[0] is not gate_up


def test_what_torch_cannot_pack_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, fitting = Copies(), matrix(16, 64, 4, 32)
    odd = matrix(17, 64, 4, 32)
    with torch.inference_mode():
        unseen = matrix(16, 64, 4, 32)
    assert copies.of(odd) is odd
    assert copies.of(unseen) is unseen
    with monkeypatch.context() as context:
        context.setattr(packed, "spare_bytes", lambda: 0)
        assert copies.of(fitting) is fitting
    assert isinstance(copies.of(fitting), Packed)


def test_a_processor_without_a_fast_product_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = matrix(16, 64, 4, 32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert Copies().of(fitting) is fitting
