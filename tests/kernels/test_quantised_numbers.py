"""Groups of 8- and 4-bit numbers: their error, their bytes, and what the compiled code makes of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.kernels.few_rows import Expert, linear, linear_twin, swiglu
from moekit.kernels.groups import BITS, GROUPS, Grouped, finite, quantise, quantise_twin, restore, row_bytes

seeds = st.integers(0, 2**31 - 1)
formats = pytest.mark.parametrize(("bits", "group"), [(bits, group) for bits in BITS for group in GROUPS])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def weights(draw: st.DrawFn, width: int) -> Tensor:
    """Normal numbers, Student's t with 2 degrees of freedom, or few outliers among small numbers."""
    source, rows = generator(draw(seeds)), draw(st.sampled_from([(1,), (5,), (2, 3)]))
    weight = torch.randn(*rows, width, generator=source)
    kind = draw(st.sampled_from(["normal", "student", "outliers"]))
    if kind == "student":
        weight = weight / torch.randn(2, *rows, width, generator=source).square().mean(dim=0).sqrt().clamp_min(1e-3)
    if kind == "outliers":
        weight = torch.where(torch.rand(*rows, width, generator=source) < 0.01, 300 * weight, weight)
    return (weight * draw(st.sampled_from([1e-3, 0.02, 1.0]))).to(
        draw(st.sampled_from([torch.float32, torch.bfloat16]))
    )


@formats
@given(data=st.data())
def test_a_restored_weight_is_within_the_promised_bound(bits: int, group: int, data: st.DataObject) -> None:
    weight = data.draw(weights(3 * group))
    groups = weight.float().unflatten(-1, (-1, group))
    least, greatest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    span = greatest - least
    # float16 has no numbers finer than 2^-24: the last term is half of that for each step and for the least value.
    bound = span / (2**bits - 1) / 2 + (least.abs() + span) / 2048 + 2**-25 * (2**bits + 1)
    assert ((restore(quantise(weight, bits, group)).unflatten(-1, (-1, group)) - groups).abs() <= bound).all()


@formats
@given(data=st.data())
def test_compiled_rounding_gives_the_bytes_of_its_twin(bits: int, group: int, data: st.DataObject) -> None:
    weight = data.draw(weights(2 * group))
    assert torch.equal(quantise(weight, bits, group).rows, quantise_twin(weight, bits, group).rows)


@formats
def test_a_row_is_what_the_numbers_mean_and_then_the_numbers(bits: int, group: int) -> None:
    weight = torch.arange(2 * group).float().view(1, -1)
    grouped = quantise(weight, bits, group)
    assert grouped.rows.shape == (1, row_bytes(2 * group, bits, group))
    scale, least = grouped.rows[0, :8].contiguous().view(torch.float16).view(2, 2).float().unbind(dim=-1)
    assert least.tolist() == [0, group]
    assert torch.allclose(scale, torch.tensor((group - 1) / (2**bits - 1)), rtol=1e-3)
    first = grouped.rows[0, 8 : 8 + group * bits // 8]
    numbers = first if bits == 8 else torch.cat([first & 15, first >> 4])
    assert torch.equal(numbers.float(), (weight[0, :group] / scale[0]).round().clamp(0, 2**bits - 1))


@formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_hidden(bits: int, group: int, bad: float) -> None:
    weight = torch.ones(2, group)
    assert finite(quantise(weight, bits, group))
    weight[1, 5] = bad
    assert not finite(quantise(weight, bits, group))
    matrix = quantise(torch.ones(3, group), bits, group)
    for n in (1, 12):
        x = torch.ones(n, group)
        x[-1, 7] = bad
        assert not linear(x, matrix)[-1].isfinite().any()
        assert linear(x, matrix)[:-1].isfinite().all()


@formats
@pytest.mark.parametrize("n", [1, 20])
def test_an_inner_number_that_is_none_is_not_hidden(bits: int, group: int, n: int) -> None:
    gate_up, down = torch.ones(2 * group, group), quantise(torch.ones(group, group), bits, group)
    x = torch.ones(n, group)
    x[-1] = float("nan")
    expert = Expert(quantise(gate_up, bits, group), down, torch.arange(n), torch.ones(n))
    found = swiglu(x, [expert])
    assert found[-1].isnan().all()
    assert found[:-1].isfinite().all()


@formats
@given(seed=seeds)
def test_a_part_of_the_rows_is_a_matrix_too(bits: int, group: int, seed: int) -> None:
    source = generator(seed)
    whole = quantise(torch.randn(9, 2 * group, generator=source), bits, group)
    x = torch.randn(10, 2 * group, generator=source)
    part = Grouped(whole.rows[2:7], bits, group)
    assert torch.allclose(linear(x, part), linear(x, whole)[:, 2:7], rtol=1e-4, atol=1e-4)
    assert torch.allclose(linear(x, part), linear_twin(x, part), rtol=1e-4, atol=1e-4)


def test_stacks_without_matrices_and_rows_without_numbers_are_ordinary() -> None:
    assert quantise(torch.zeros(0, 3, 64), 4, 64).rows.shape == (0, 3, 36)
    assert restore(quantise(torch.zeros(0, 3, 64), 8, 64)).shape == (0, 3, 64)
    assert quantise(torch.zeros(2, 0), 4, 32).rows.shape == (2, 0)


@pytest.mark.parametrize(("bits", "group", "width"), [(3, 64, 64), (4, 48, 48), (4, 64, 96)])
def test_what_no_groups_divide_is_refused(bits: int, group: int, width: int) -> None:
    with pytest.raises(ValueError, match="no groups"):
        quantise(torch.zeros(2, width), bits, group)
