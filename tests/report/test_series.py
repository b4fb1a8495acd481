"""Picking, smoothing and thinning the values of a run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.report.curves import curves
from moekit.report.series import Series, evenly, pick, smooth, tail_means, thin

values = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=400)


def series(entries: list[float]) -> Series:
    return Series("x", [float(i) for i in range(len(entries))], entries)


@given(values, st.integers(4, 50))
def test_thinning_keeps_real_points_the_ends_and_the_extremes(entries, points):
    before = series(entries)
    after = thin(before, points)
    assert len(after.values) <= max(points, min(len(entries), points))
    pairs = dict(zip(before.steps, before.values, strict=True))
    assert all(repr(pairs[step]) == repr(value) for step, value in zip(after.steps, after.values, strict=True))
    if entries:
        assert after.steps[0] == 0 and after.steps[-1] == len(entries) - 1
    if before.finite:
        assert (min(after.finite), max(after.finite)) == (min(before.finite), max(before.finite))


@given(st.integers(0, 500), st.integers(2, 30))
def test_even_places_rise_from_the_first_to_the_last(n, places):
    chosen = evenly(n, places)
    assert len(chosen) == min(n, places) and chosen == sorted(set(chosen))
    assert n == 0 or (chosen[0], chosen[-1]) == (0, n - 1)


@given(values)
def test_smoothing_stays_within_the_range_and_keeps_the_steps(entries):
    before = series(entries)
    after = smooth(before)
    assert after.steps == before.steps
    slack = 1e-6 * max(map(abs, before.finite), default=1.0) + 1e-9
    assert all(min(before.finite) - slack <= value <= max(before.finite) + slack for value in after.finite)


def test_smoothing_a_straight_line_changes_nothing_away_from_its_ends():
    line = [0.5 * i for i in range(200)]
    assert smooth(series(line)).values[5:-5] == pytest.approx(line[5:-5])


def test_tail_means_compare_the_end_with_what_came_before():
    assert tail_means(series([5.0] * 80 + [3.0] * 10 + [2.0] * 10)) == (2.0, 3.0)
    assert tail_means(series([1.0] * 9)) is None


def test_a_value_that_some_rows_lack_is_taken_where_it_is():
    rows = [{"step": 1, "a": {"b": 2}}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": {"b": "no number"}}]
    picked = pick("b", rows, "a", "b")
    assert picked.steps == [1.0, 4.0] and picked.values[0] == 2.0 and math.isnan(picked.values[1])


def test_rows_become_one_series_for_each_layer_and_domain():
    layers = [{"layer": 3, "max_violation": 0.5}, {"layer": 7, "max_violation": 0.25}]
    run = curves([{"step": 5, "loss": 2.0, "layers": layers, "validation": {"a": {"bits_per_byte": 1.5}}}])
    assert [(s.name, s.values) for s in run.max_violation] == [("layer 3", [0.5]), ("layer 7", [0.25])]
    assert [(s.name, s.steps, s.values) for s in run.validation] == [("a", [5.0], [1.5])]
    assert run.loss[0].values == [2.0] and run.dead_experts == ()
