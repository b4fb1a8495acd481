"""Axes are round, labels stand apart, and marks lie where the values are."""

import itertools
import math
import re

from hypothesis import given
from hypothesis import strategies as st

from moekit.report.charts import line_chart, load_bars
from moekit.report.charts.lines import spread
from moekit.report.charts.scale import linear_axis, log_axis, number, step_axis, tick_text
from moekit.report.charts.svg import cells, shorten
from moekit.report.series import Series

floats = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(floats, max_size=20), st.booleans(), st.booleans())
def test_an_axis_has_rising_ticks_that_read_differently(values, log, zero):
    axis = log_axis(values) if log else linear_axis(values, zero=zero)
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 13
    assert all(a < b for a, b in itertools.pairwise(axis.ticks))
    assert all(0 <= axis.place(value) <= 1 for value in values if math.isfinite(value))


@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 2)), min_size=1, max_size=20))
def test_ticks_of_ordinary_values_read_differently(values):
    for axis in (linear_axis(values), linear_axis(values, zero=True)):
        texts = [tick_text(tick, axis) for tick in axis.ticks]
        assert len(set(texts)) == len(texts)


def test_ticks_are_round():
    assert linear_axis([0.03, 0.97]).ticks == (0.0, 0.25, 0.5, 0.75, 1.0)
    axis = linear_axis([2.44, 8.7])
    assert [tick_text(tick, axis) for tick in axis.ticks] == ["2", "4", "6", "8", "10"]
    steps = step_axis([1.0, 100_000.0])
    assert [tick_text(tick, steps) for tick in steps.ticks] == ["25k", "50k", "75k", "100k"]


@given(st.lists(st.integers(0, 10**18).map(float), max_size=9))
def test_steps_are_whole_and_have_a_place(steps):
    axis = step_axis(steps)
    assert all(tick == round(tick) for tick in axis.ticks)
    assert all(0 <= axis.place(step) <= 1 for step in steps)


def test_numbers_have_the_digits_that_matter():
    dash = "\N{EN DASH}"
    shown = [number(value) for value in (0, 3.14159, 0.00012345, 20973.6, 4096000, -0.5, 1e-7, math.nan, math.inf)]
    assert shown == ["0", "3.14", "0.000123", "20,974", "4,096,000", "\N{MINUS SIGN}0.500", "1.00e-07", dash, dash]


@given(st.lists(st.floats(-50, 300), max_size=12))
def test_labels_stand_apart_and_keep_their_order(places):
    moved = spread(places, 16.0, 4.0, 216.0)
    ordered = sorted(range(len(places)), key=lambda i: places[i])
    assert all(moved[b] - moved[a] >= 16 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert all(4 - 1e-6 <= place <= 216 + 1e-6 for place in moved)


def test_a_long_name_is_cut_by_its_width():
    assert shorten("japanese") == "japanese"
    assert cells(shorten("吾輩は猫である名前はまだ無い")) <= 16 and shorten("a" * 40).endswith("…")


def test_a_gap_breaks_the_line_and_a_lone_point_shows():
    chart = line_chart([Series("x", [1.0, 2.0, 3.0], [1.0, math.nan, 2.0])], unit="u")
    (line,) = re.findall(r'<path class="line s0" d="([^"]*)"', chart)
    assert line.count("M") == 2 and line.count("h0") == 2 and "L" not in line
    assert chart.count("<circle") == 2


def test_an_expert_without_load_is_marked():
    bars = load_bars([("layer 1", [3, 0, 6], "")])
    assert bars.count('class="bar"') == 2 and bars.count('class="dead"') == 1
    assert "expert 1: 0 slots" in bars
