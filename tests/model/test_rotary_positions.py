"""Rotary positions: both layouts, relative, and stretched by YaRN as published."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.config.model import LinearConfig, Llama3Config, RopeConfig, YarnConfig
from moekit.model.rope import frequencies, room_for_turn, rotate, rotation, softmax_factor, turn, turn_at
from oracle import rotary as oracle
from oracle.compare import relative_error

layouts = pytest.mark.parametrize("layout", ["half", "interleaved"])
positions = st.integers(0, 200)
seeds = st.integers(0, 2**31 - 1)


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, position: int, config: RopeConfig) -> Tensor:
    return rotate(x.view(1, 1, 1, -1), rotation(config, x.numel(), torch.tensor([position]))).flatten()


@layouts
@given(seed=seeds, m=positions, n=positions, half=st.integers(1, 8))
def test_products_equal_those_of_the_plain_rotation(layout: str, seed: int, m: int, n: int, half: int) -> None:
    q, k = vectors(seed, 2, 2 * half)
    config = RopeConfig(layout=layout)
    turns = oracle.frequencies(config.theta, 2 * half)
    expected = oracle.rotated(q, m, turns, layout) @ oracle.rotated(k, n, turns, layout)
    actual = turned(q, m, config) @ turned(k, n, config)
    # Angles are float32: at position 200 they are right to 200 * 2^-24 radians.
    assert torch.allclose(actual, expected, rtol=0, atol=1e-4 * float(q.norm() * k.norm()))


@layouts
@given(seed=seeds, m=st.integers(0, 50), n=st.integers(0, 50), shift=st.integers(0, 50))
def test_products_depend_on_the_distance_alone(layout: str, seed: int, m: int, n: int, shift: int) -> None:
    q, k = vectors(seed, 2, 8)
    config = RopeConfig(layout=layout)
    here = turned(q, m, config) @ turned(k, n, config)
    there = turned(q, m + shift, config) @ turned(k, n + shift, config)
    assert torch.allclose(here, there, atol=1e-4)


@layouts
def test_position_zero_turns_nothing(layout: str) -> None:
    q, k = vectors(0, 2, 8)
    config = RopeConfig(layout=layout)
    assert torch.allclose(turned(q, 0, config) @ turned(k, 0, config), q @ k)


def test_both_layouts_turn_the_same_pairs_once_these_are_reordered() -> None:
    x = vectors(0, 8)
    reordered = torch.cat([x[0::2], x[1::2]])
    one = turned(x, 7, RopeConfig(layout="interleaved"))
    assert torch.allclose(one, turned(reordered, 7, RopeConfig(layout="half")))


def test_the_layout_matters() -> None:
    q, k = vectors(0, 2, 8)
    products = [
        turned(q, 9, RopeConfig(layout=layout)) @ turned(k, 2, RopeConfig(layout=layout))
        for layout in ("half", "interleaved")
    ]
    assert abs(products[0] - products[1]) > 0.01


@pytest.mark.parametrize(("mscale", "published"), [(0.707, 1.5896), (1.0, 1.8739)])
def test_yarn_multiplies_the_softmax_scale_as_published(mscale: float, published: float) -> None:
    yarn = YarnConfig(factor=40.0, mscale=mscale, mscale_all_dim=mscale)
    assert round(softmax_factor(RopeConfig(scaling=yarn)), 4) == published


def test_without_yarn_the_softmax_scale_stays() -> None:
    assert softmax_factor(RopeConfig()) == 1.0


def test_cosines_carry_the_ratio_of_both_temperatures() -> None:
    yarn = YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=0.5)
    cos = rotation(RopeConfig(scaling=yarn), 8, torch.tensor([0])).cos
    expected = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert torch.allclose(cos, torch.full_like(cos, expected))


@given(
    half=st.integers(2, 32),
    theta=st.sampled_from([1e4, 1e6]),
    factor=st.floats(1.0, 64.0),
    original=st.sampled_from([1024, 4096, 32768]),
)
def test_yarn_frequencies_equal_their_formula(half: int, theta: float, factor: float, original: int) -> None:
    yarn = YarnConfig(factor=factor, original_max_positions=original)
    actual = frequencies(RopeConfig(theta=theta, scaling=yarn), 2 * half, torch.device("cpu"))
    expected = oracle.yarn_frequencies(theta, 2 * half, factor, original, yarn.beta_fast, yarn.beta_slow)
    assert torch.allclose(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5)


def test_yarn_keeps_the_fastest_and_divides_the_slowest_frequency() -> None:
    config = RopeConfig(scaling=YarnConfig(factor=40.0))
    plain = frequencies(RopeConfig(), 64, torch.device("cpu"))
    stretched = frequencies(config, 64, torch.device("cpu"))
    assert stretched[0] == plain[0]
    assert torch.isclose(stretched[-1], plain[-1] / 40)


@layouts
@given(position=st.integers(0, 200_000), half=st.integers(1, 40), stretched=st.booleans())
def test_the_rotation_of_one_place_is_that_of_many_to_the_bit(
    layout: str, position: int, half: int, stretched: bool
) -> None:
    scaling = YarnConfig(factor=40.0, attention_factor=1.25) if stretched else None
    config = RopeConfig(layout=layout, scaling=scaling)
    found = room_for_turn(config, 2 * half)
    turn_at(position, config, found)
    expected = turn(rotation(config, 2 * half, torch.tensor([position])))
    assert torch.equal(found.cos, expected.cos) and torch.equal(found.sin, expected.sin)
    assert found.interleaved == expected.interleaved


def test_a_given_factor_takes_the_place_of_the_temperatures() -> None:
    yarn = YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=0.5, attention_factor=1.25)
    cos = rotation(RopeConfig(scaling=yarn), 8, torch.tensor([0])).cos
    assert torch.equal(cos, torch.full_like(cos, 1.25))
    assert softmax_factor(RopeConfig(scaling=yarn)) == pytest.approx((0.05 * math.log(40) + 1) ** 2)


def test_a_ramp_without_whole_ends_starts_where_the_formula_says() -> None:
    rounded, exact = (
        frequencies(RopeConfig(scaling=YarnConfig(factor=40.0, truncate=truncate)), 64, torch.device("cpu"))
        for truncate in (True, False)
    )
    plain = frequencies(RopeConfig(), 64, torch.device("cpu"))
    # 64 ln(4096 / (32 2 pi)) / (2 ln 10000) = 10.47 and, for one rotation, 22.51.
    slow = ((torch.arange(32) - 10.4722) / (22.5133 - 10.4722)).clamp(0, 1)
    assert torch.allclose(exact, plain / 40 * slow + plain * (1 - slow), rtol=1e-4)
    assert not torch.equal(rounded, exact)


def test_linear_interpolation_divides_every_frequency() -> None:
    plain = frequencies(RopeConfig(theta=500.0), 16, torch.device("cpu"))
    scaled = frequencies(RopeConfig(theta=500.0, scaling=LinearConfig(factor=4.0)), 16, torch.device("cpu"))
    assert torch.equal(scaled, plain / 4)


@given(half=st.integers(1, 32), theta=st.sampled_from([1e4, 5e5]), original=st.sampled_from([16, 1024, 8192]))
def test_llama_3_frequencies_equal_their_formula(half: int, theta: float, original: int) -> None:
    llama = Llama3Config(original_max_positions=original)
    actual = frequencies(RopeConfig(theta=theta, scaling=llama), 2 * half, torch.device("cpu"))
    expected = oracle.llama3_frequencies(theta, 2 * half, 8.0, original, 1.0, 4.0)
    assert torch.allclose(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4)


def test_angles_are_float32_while_the_vectors_are_bfloat16() -> None:
    by = rotation(RopeConfig(), 8, torch.tensor([1001]))
    assert by.cos.dtype == torch.float32
    assert rotate(vectors(0, 1, 1, 1, 8).bfloat16(), by).dtype == torch.bfloat16
    assert relative_error(by.cos[0], torch.cos(1001 * frequencies(RopeConfig(), 8, torch.device("cpu")))) < 1e-6
