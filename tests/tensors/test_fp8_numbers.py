"""FP8 in blocks and groups equals the loop over its definition, errs as little as E4M3 can, and keeps what it holds."""

from types import SimpleNamespace

import pytest
import torch
from block_loops import E4M3, blocks, nearest, product, rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from moekit.config.errors import InputError
from moekit.tensors.fp8 import dequantise_blocks, quantise_blocks, round_blocks, round_rows

HALF_STEP = 2.0**-4
"""Largest error of a normal number, relative to it; a subnormal's is half a step of the subnormals, 2^-10."""

FLOAT = torch.finfo(torch.float32).eps


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Numbers over many powers of two with zeros among them; sides around one block or two."""
    sides = st.sampled_from([1, 3, 64, 127, 128, 129, 200, 256])
    out, width = draw(sides), draw(st.sampled_from([1, 5, 128, 130]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    exponents = torch.rand(out, width, generator=source) * draw(st.sampled_from([0.0, 12.0, 40.0]))
    weight = torch.randn(out, width, generator=source) * torch.exp2(-exponents) * draw(st.sampled_from([1e-15, 1, 1e9]))
    return weight.masked_fill_(torch.rand(out, width, generator=source) < 0.1, 0)


def error_bound(exact: Tensor, scale: Tensor) -> Tensor:
    """Of a number in a block with this scale; twice the rounding of float32 comes on top, for / and *."""
    return torch.maximum(exact.abs() * (HALF_STEP + 2 * FLOAT), scale * 2.0**-10 * (1 + 2 * FLOAT))


def test_the_table_of_the_twin_is_that_of_the_format() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert every.tolist() == E4M3


@settings(max_examples=20)
@given(matrices())
def test_blocks_equal_the_loop_over_blocks(weight: Tensor) -> None:
    weight = weight[:200, :130]
    values, scales = blocks(weight)
    found = quantise_blocks(weight)
    assert found.values.dtype == torch.float8_e4m3fn
    assert torch.equal(found.scale_inv, scales)
    assert torch.equal(found.values.float(), values)


@pytest.mark.parametrize("block", [(128, 128), (2, 3), (1, 64), (500, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantising_is_each_value_times_the_scale_of_its_block(block: tuple[int, int], dtype: torch.dtype) -> None:
    values = torch.randn(133, 70, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-133 // block[0]), -(-70 // block[1]), generator=torch.Generator().manual_seed(1))
    found = dequantise_blocks(values, scales, dtype, block)
    assert found.dtype == dtype
    assert torch.equal(found, product(values, scales, *block).to(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 3)])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_scales_that_are_not_one_for_each_block_are_an_error(shape: tuple[int, ...], stack: tuple[int, ...]) -> None:
    values = torch.zeros(*stack, 133, 140).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="do not fit a weight") as error:
        dequantise_blocks(values, torch.ones(*stack, *shape), torch.float32)
    assert error.value.hint == "there must be one for each block of 128 x 128"


def test_every_pattern_is_decoded_as_the_format_says() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    found = dequantise_blocks(values, torch.ones(1, 1), torch.float32)
    torch.testing.assert_close(found, values.float(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=30)
@given(matrices())
def test_the_error_is_at_most_that_of_three_bits_of_mantissa(weight: Tensor) -> None:
    found = quantise_blocks(weight)
    scale = found.scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    error = (dequantise_blocks(*found, torch.float32) - weight).abs()
    assert (error <= error_bound(weight, scale)).all()


@settings(max_examples=30)
@given(matrices(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_fp8_holds_is_held_again(weight: Tensor, dtype: torch.dtype) -> None:
    """Exactly in bfloat16; in float32 the scale may change in its last bit, and a product in two."""
    for rounding in (round_rows, round_blocks):
        once = rounding(weight.to(dtype))
        twice = rounding(once)
        tolerance = 2 * FLOAT if dtype == torch.float32 else 0
        assert ((twice - once).abs() <= tolerance * once.abs()).all()
        assert torch.equal(torch.signbit(twice), torch.signbit(once))


@settings(max_examples=20)
@given(matrices())
def test_a_stay_in_bfloat16_does_not_change_the_fp8_values(weight: Tensor) -> None:
    first = quantise_blocks(weight)
    again = quantise_blocks(dequantise_blocks(*first, torch.bfloat16))
    torch.testing.assert_close(again.scale_inv, first.scale_inv, rtol=2.0**-8, atol=0)
    assert torch.equal(again.values.float(), first.values.float())


@settings(max_examples=20)
@given(matrices(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rows_equal_the_loop_over_groups_of_128(x: Tensor, dtype: torch.dtype) -> None:
    x = x[:3].to(dtype)
    groups = [list(row.split(128)) for row in x.float()]
    expected = [torch.cat([torch.mul(*rounded(part)) for part in row]) for row in groups]
    found = round_rows(x)
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack(expected).to(dtype))


def test_zeros_stay_zero_in_blocks_and_groups() -> None:
    weight = torch.zeros(130, 260)
    weight[0, 0] = 3.0
    assert torch.equal(round_blocks(weight), weight)
    assert torch.equal(round_rows(weight), weight)
    assert torch.equal(quantise_blocks(weight).scale_inv[1:], torch.ones(1, 3))


def test_the_smallest_numbers_of_float32_do_no_harm() -> None:
    tiny = torch.full((2, 130), 1e-45)
    assert (round_rows(tiny) <= 1e-44).all()
    assert round_blocks(tiny).isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_not_finite_stays_so_and_spoils_its_own_group_alone(bad: float) -> None:
    x = torch.ones(2, 300)
    x[1, 140] = bad
    found = round_rows(x)
    assert not found[1, 140].isfinite()
    others = torch.ones(2, 300, dtype=torch.bool)
    others[1, 128:256] = False
    assert torch.equal(found[others], x[others])
    assert not round_blocks(x)[1, 140].isfinite()


def test_a_number_between_two_goes_to_the_even_one() -> None:
    x = torch.tensor([448.0, 432.0, 17.0, 19.0, 2.0**-10, -3 * 2.0**-10])
    assert round_rows(x).tolist() == [448.0, 448.0, 16.0, 20.0, 0.0, -(2.0**-8)]
    assert [nearest(value) for value in x.tolist()] == round_rows(x).tolist()


@pytest.mark.parametrize("shape", [(3, 4, 200), (200,), (0, 192), (2, 0, 7)])
def test_rows_may_have_any_leading_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_rows(x).view(-1), torch.cat([*map(round_rows, x.view(-1, shape[-1])), torch.empty(0)]))


def test_stacked_matrices_are_rounded_one_by_one() -> None:
    stack = torch.randn(2, 3, 130, 140, generator=torch.Generator().manual_seed(0))
    values, scales = quantise_blocks(stack)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        one = quantise_blocks(stack[tuple(place)])
        assert torch.equal(values[tuple(place)].float(), one.values.float())
        assert torch.equal(scales[tuple(place)], one.scale_inv)
    assert torch.equal(dequantise_blocks(values, scales, torch.float32), round_blocks(stack))


def test_parts_have_blocks_of_their_own() -> None:
    source = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 70, 90, generator=source) * torch.tensor([1.0, 100.0])[:, None, None]
    found = round_blocks(torch.cat([gate, up]), parts=2)
    assert torch.equal(found, torch.cat([round_blocks(gate), round_blocks(up)]))
    assert not torch.equal(found, round_blocks(torch.cat([gate, up])))


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(4, 150, generator=torch.Generator().manual_seed(0), requires_grad=True)
    direction = torch.randn(4, 150, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(round_rows(x), x, direction)
    assert torch.equal(gradient, direction)


def test_transformers_reads_our_blocks_and_we_read_those_of_transformers() -> None:
    rule = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(128, 128)))
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 256)[:, None]
    theirs = Fp8Quantize(rule).convert({"weight": weight})
    ours = quantise_blocks(weight)
    torch.testing.assert_close(ours.scale_inv, theirs["weight_scale_inv"], rtol=2 * FLOAT, atol=0)
    assert (ours.values.float() != theirs["weight"].float()).sum() < 1e-4 * weight.numel()
    for values, scale in (ours, (theirs["weight"], theirs["weight_scale_inv"])):
        expected = Fp8Dequantize(rule)._dequantize_one(values, scale, torch.bfloat16)
        assert torch.equal(dequantise_blocks(values, scale, torch.bfloat16), expected)
