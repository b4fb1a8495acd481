"""The page of a plan is one well-formed file that refers to nothing, and says what the sections say."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_page import EVIL, Page

from moekit.config.presets.load import load_run
from moekit.plan.figure import Figure, Section
from moekit.plan.from_config import blueprint_of
from moekit.plan.parameters import parameters
from moekit.plan.words import words
from moekit.report.charts.stacks import Segment, Stack, stacked_bars
from moekit.report.plan_page import PlannedModel, render_plan


def planned(name: str) -> PlannedModel:
    sections = [parameters(blueprint_of(load_run(name).model, name, name)), odd_section()]
    return PlannedModel(name, [("model", name), ("batch", "batch of 1")], sections)


def odd_section() -> Section:
    figures = (
        Figure("a.time", "time", 0.0142, "s", "a / b", "1.42 / 100", "a bound"),
        Figure("b.time", "time", float("inf"), "s"),
        Figure("none", "nothing", None),
        Figure("fits", "it fits", False),
    )
    return Section("odd", "Odd figures", figures, ("one note",))


def text_of(page: str) -> str:
    return " ".join(" ".join(Page(page).text).split())


@pytest.mark.parametrize("names", [["deepseek-v3"], ["deepseek-v3", "mixtral-8x7b", "tiny"]])
def test_tags_balance_and_the_page_refers_to_nothing_outside_itself(names: list[str]) -> None:
    text = render_plan("names", [planned(name) for name in names])
    page = Page(text)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import", text)


def test_every_figure_formula_and_note_is_on_the_page_of_one_model() -> None:
    model = planned("deepseek-v3")
    text = text_of(render_plan("name", [model]))
    for section in model.sections:
        for figure in section.figures:
            assert figure.label in text and words(figure) in text
            for part in (figure.formula, figure.numbers, figure.note):
                assert " ".join(part.split()) in text
        assert all(note in text for note in section.notes)
    assert "671,026,419,200" in text and "37,552,297,472" in text


def test_two_figures_with_one_label_are_told_apart() -> None:
    text = text_of(render_plan("tiny", [planned("tiny")]))
    assert "a: time" in text and "b: time" in text


def test_models_side_by_side_share_a_table_and_a_scale() -> None:
    page = render_plan("two", [planned("deepseek-v3"), planned("mixtral-8x7b")])
    text = text_of(page)
    assert "deepseek-v3" in text and "mixtral-8x7b" in text
    assert "682.6B" in text and "46.7B" in text
    # 46.7 of 682.6: the bar of the smaller model is 6.8 % of the width, its routed experts 6.61 %.
    assert 'width="6.61%"' in page


def widths(bars: str, part: str) -> list[float]:
    return [float(width) for width in re.findall(rf'class="part part-{part}" x="[\d.]+%" width="([\d.]+)%"', bars)]


def test_bars_are_on_one_scale_and_an_enlarged_one_fills_it() -> None:
    stacks = [
        Stack("whole", "100", [Segment("a", 60, "60"), Segment("b", 40, "40")]),
        Stack("used", "10", [Segment("a", 4, "4"), Segment("b", 6, "6")]),
        Stack("enlarged", "10", [Segment("a", 4, "4"), Segment("b", 6, "6")], enlarged=True),
    ]
    bars = stacked_bars(stacks, "about")
    assert widths(bars, "a") == [60, 4, 40]
    assert widths(bars, "b") == [40, 6, 60]


def test_bars_of_nothing_are_drawn() -> None:
    assert "<svg" in stacked_bars([Stack("none", "0", [Segment("a", 0, "0")])], "about")


def test_every_text_from_outside_is_escaped() -> None:
    figures = (Figure("key", EVIL, EVIL, "", EVIL, EVIL, EVIL),)
    model = PlannedModel(EVIL, [(EVIL, EVIL)], [planned("tiny").sections[0], Section("key", EVIL, figures, (EVIL,))])
    for models in ([model], [model, model]):
        text = render_plan(EVIL, models)
        assert "script" not in Page(text).tags
        assert "<script" not in text and "\x00" not in text and "\x1b" not in text
        text.encode("utf-8")


@given(
    st.integers() | st.floats() | st.text(max_size=20) | st.none() | st.booleans(),
    st.sampled_from(["", "B", "s", "%", "FLOP", "tokens/s"]),
)
def test_a_figure_of_any_value_and_unit_renders(value: object, unit: str) -> None:
    figures = (Figure("key", "label", value, unit),)  # type: ignore[arg-type]
    Page(render_plan("any", [PlannedModel("any", [], [Section("key", "title", figures)])]))
