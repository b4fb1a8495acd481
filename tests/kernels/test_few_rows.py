"""The compiled products equal their plain twins, on every instruction set that the machine has."""

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads_of_torch
from torch import Tensor

from moekit.kernels.few_rows import Expert, linear, linear_twin, rounded, swiglu, swiglu_twin
from moekit.kernels.groups import Grouped, quantise, restore

seeds = st.integers(0, 2**31 - 1)
units = st.sampled_from([24, 32])
FORMATS = [(16, 0), *((bits, group) for bits in (4, 8) for group in (32, 64, 128))]
formats = pytest.mark.parametrize(("bits", "group"), FORMATS)
levels = pytest.mark.parametrize("level", [0, 1, 2])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(weight: Tensor, bits: int, group: int) -> Tensor | Grouped:
    return weight.bfloat16() if bits == 16 else quantise(weight, bits, group)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@levels
@formats
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    n=st.integers(1, 130),
    out=st.integers(1, 140),
    groups=st.integers(1, 9),
    unit=units,
    heavy=st.booleans(),
)
def test_a_product_equals_its_twin(
    bits: int, group: int, seed: int, n: int, out: int, groups: int, unit: int, heavy: bool
) -> None:
    source, inputs = generator(seed), groups * (group or unit)
    weight = torch.randn(out, inputs, generator=source)
    weight = weight**5 if heavy else weight
    x = torch.randn(n, inputs, generator=source)
    matrix = stored(weight, bits, group)
    # Of what the norms allow: a product of heavy numbers may cancel to little.
    largest = x.norm() * (weight if bits == 16 else restore(matrix)).norm()
    assert (linear(x, matrix) - linear_twin(x, matrix)).norm() <= 1e-6 * largest


@levels
@formats
@pytest.mark.usefixtures("at_level")
@given(seed=seeds, n=st.integers(1, 8), out=st.integers(1, 60), groups=st.integers(1, 9), unit=units, data=st.data())
def test_a_product_is_the_same_wherever_its_row_lies(
    bits: int, group: int, seed: int, n: int, out: int, groups: int, unit: int, data: st.DataObject
) -> None:
    source, inputs = generator(seed), groups * (group or unit)
    weight, x = torch.randn(out, inputs, generator=source), torch.randn(n, inputs, generator=source)
    first = data.draw(st.integers(0, out - 1))
    whole = linear(x, stored(weight, bits, group))
    assert torch.equal(linear(x, stored(weight[first:].contiguous(), bits, group)), whole[:, first:])


@levels
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    n=st.sampled_from([1, 1, 1, 2, 9]),
    out=st.integers(1, 2000),
    inputs=st.sampled_from([96, 256, 288, 512, 544, 1120, 2080]),
    apart=st.booleans(),
    threads=st.integers(1, 4),
)
def test_rows_of_a_long_matrix_are_those_of_short_ones(
    seed: int, n: int, out: int, inputs: int, apart: bool, threads: int
) -> None:
    source = generator(seed)
    x, wider = torch.randn(n, inputs, generator=source), torch.randn(out, inputs + 32, generator=source).bfloat16()
    weight = wider[:, :inputs] if apart else wider[:, :inputs].contiguous()
    with threads_of_torch(threads):
        found = linear(x, weight)
    assert (found - linear_twin(x, weight)).norm() <= 1e-6 * x.norm() * weight.float().norm()
    assert torch.equal(found, torch.cat([linear(x, rows) for rows in weight.split(16)], dim=1))


@levels
@formats
@pytest.mark.usefixtures("at_level")
@given(seed=seeds, n=st.integers(1, 70), shape=st.tuples(st.integers(1, 3), st.integers(1, 3)), data=st.data())
def test_experts_in_one_region_equal_their_twin(
    bits: int, group: int, seed: int, n: int, shape: tuple[int, int], data: st.DataObject
) -> None:
    source = generator(seed)
    unit = group or 24
    width, inner = unit * shape[0], unit * shape[1]
    x = torch.randn(n, width, generator=source)
    experts = []
    for _ in range(data.draw(st.integers(0, 4))):
        tokens = torch.randperm(n, generator=source)[: data.draw(st.integers(0, n))]
        gate_up = torch.randn(2 * inner, width, generator=source) / width**0.5
        down = torch.randn(width, inner, generator=source) / inner**0.5
        weights = torch.rand(len(tokens), generator=source)
        experts.append(Expert(stored(gate_up, bits, group), stored(down, bits, group), tokens, weights))
    found, expected = swiglu(x, experts), swiglu_twin(x, experts)
    # Between the products, a number near the middle of two steps may round either way.
    assert relative_error(found, expected) < (2e-3 if bits == 16 else 1e-2)


@levels
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    width=st.sampled_from([288, 512, 1120]),
    inner=st.sampled_from([288, 544, 1120]),
    threads=st.integers(1, 4),
)
def test_wide_experts_of_a_token_equal_their_twin(seed: int, width: int, inner: int, threads: int) -> None:
    source, one = generator(seed), torch.zeros(1, dtype=torch.int64)
    x = torch.randn(1, width, generator=source)
    experts = []
    for _ in range(2):
        gate_up = torch.randn(2 * inner, width, generator=source).bfloat16() / 32
        down = torch.randn(width, inner, generator=source).bfloat16() / 32
        experts.append(Expert(gate_up, down, one, torch.rand(1, generator=source)))
    found = swiglu(x, experts)
    assert relative_error(found, swiglu_twin(x, experts)) < 2e-3
    with threads_of_torch(threads):
        assert torch.equal(swiglu(x, experts), found)


@levels
@pytest.mark.usefixtures("at_level")
@given(seed=seeds, counts=st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_experts_of_several_formats_share_a_call(seed: int, counts: list[int]) -> None:
    source, x = generator(seed), torch.randn(40, 128, generator=generator(seed))
    experts = []
    for n, first, second in zip(counts, FORMATS[1:5], [FORMATS[6], *FORMATS[:3]], strict=True):
        gate_up = torch.randn(2 * 128, 128, generator=source) / 12
        down = torch.randn(128, 128, generator=source) / 12
        tokens, weights = torch.randperm(40, generator=source)[:n], torch.rand(n, generator=source)
        experts.append(Expert(stored(gate_up, *first), stored(down, *second), tokens, weights))
    assert relative_error(swiglu(x, experts), swiglu_twin(x, experts)) < 1e-2


@levels
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    width=st.sampled_from([32, 40, 96, 160, 512, 544, 1056]),
    inner=st.sampled_from([32, 64, 96, 128]),
    runs=st.lists(
        st.tuples(st.sampled_from(["of one token", "of another", "wider", "now and then apart"]), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    ),
    threads=st.integers(1, 4),
)
def test_narrow_experts_of_a_token_add_up_to_what_each_finds(
    seed: int, width: int, inner: int, runs: list[tuple[str, int]], threads: int
) -> None:
    source = generator(seed)
    # Sums of these are exact in any order: all round alike between the products.
    x = torch.randint(-4, 5, (2, width), generator=source).float()
    experts = []
    for kind, i in ((kind, i) for kind, n in runs for i in range(n)):
        numbers = 160 if kind == "wider" else inner
        gate_up = torch.randint(-4, 5, (2 * numbers, 2 * width), generator=source).bfloat16() / 64
        down = torch.randn(width, numbers, generator=source).bfloat16()
        gate_up = gate_up[:, :width] if "apart" in kind and i % 3 == 1 else gate_up[:, :width].contiguous()
        token = torch.tensor([int(kind == "of another")])
        experts.append(Expert(gate_up, down, token, torch.rand(1, generator=source)))
    expected = sum((swiglu(x, [expert]) for expert in experts), torch.zeros(2, width))
    largest = sum(float(swiglu(x, [expert]).norm()) for expert in experts)
    found = swiglu(x, experts)
    assert (found - expected).norm() <= 1e-6 * largest
    with threads_of_torch(threads):
        assert torch.equal(swiglu(x, experts), found)


@pytest.mark.parametrize(("bits", "group"), FORMATS[1:])
def test_equal_weights_are_kept(bits: int, group: int) -> None:
    weight = torch.full((2, group), -0.375)
    assert torch.equal(restore(quantise(weight, bits, group)), weight)


@given(seed=seeds)
def test_rounded_rows_are_within_half_a_step(seed: int) -> None:
    x = torch.randn(3, 64, generator=generator(seed))
    step = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    assert ((rounded(x, 32) - x).unflatten(-1, (-1, 32)).abs() <= 0.501 * step).all()


def test_zero_rows_are_ordinary() -> None:
    matrix = quantise(torch.randn(4, 64, generator=generator(0)), 4, 64)
    assert not linear(torch.zeros(2, 64), matrix).any()
    assert linear(torch.zeros(0, 64), matrix).shape == (0, 4)
    assert ctypes.sizeof(ctypes.c_void_p) == 8


@levels
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    n=st.integers(1, 40),
    shape=st.sampled_from([(3, 24), (140, 48), (2000, 48)]),
    narrow=st.tuples(st.booleans(), st.booleans()),
)
def test_rows_and_results_may_be_narrow(seed: int, n: int, shape: tuple[int, int], narrow: tuple[bool, bool]) -> None:
    source, (out, inputs) = generator(seed), shape
    rows, result = (torch.bfloat16 if each else torch.float32 for each in narrow)
    matrix = torch.randn(out, inputs, generator=source).bfloat16()
    x = torch.randn(n, inputs, generator=source).to(rows)
    expected = linear(x.float(), matrix).to(result)
    assert torch.equal(linear(x, matrix, result), expected)
    assert linear(x, matrix, torch.float16).dtype == torch.float16
    assert torch.equal(linear(x.T.contiguous().T, matrix, result), expected)
