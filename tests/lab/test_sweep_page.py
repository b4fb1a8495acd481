"""The page of a sweep is one file that refers to nothing, names every variant and says what the figures say."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.report.charts.whiskers import Whisker, whisker_chart
from moekit.report.series import Series
from moekit.report.sweep_page import render_sweep
from moekit.report.sweep_values import Estimate, SweepResult, VariantResult

EVIL = "<script>alert('1')</script>&\"\x00\x1b\ud800\u202e"


class Page(HTMLParser):
    """Tags, attributes and text of a page whose tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)


def text_of(page: str) -> str:
    return " ".join(" ".join(Page(page).words).split())


def result(name: str, loss: float = 5.0, gap: Estimate | None = None, seeds: int = 3, **changes) -> VariantResult:
    def spread(value: float) -> Estimate:
        return Estimate(value, 0.0125 if seeds > 1 else None, (value,) * seeds)

    figures = {
        "loss": loss,
        "bits_per_byte": loss / 2,
        "max_violation": 1.25,
        "max_violation_global": 0.75,
        "entropy": 0.9,
        "dead_experts": 2.0,
        "drop_rate": 0.125,
        "experts_per_token": 3.5,
        "tokens_per_s": 12345.0,
    }
    steps = [1.0, 2.0, 3.0]
    return replace(
        VariantResult(
            name=name,
            seeds=tuple(range(seeds)),
            causal=True,
            figures={key: spread(value) for key, value in figures.items()},
            difference=gap,
            max_violation=Series(name, steps, [3.0, 2.0, 1.0]),
            loss=Series(name, steps, [8.0, 7.0, 6.0]),
            sets={"model.moe.top_k": "3"},
            about=f"about {name}",
        ),
        **changes,
    )


def page(*variants: VariantResult, title: str = "A lab") -> str:
    return render_sweep(SweepResult(title=title, facts=[("seeds", "0, 1, 2")], variants=variants))


def test_the_page_refers_to_nothing_outside_itself_and_names_every_variant() -> None:
    variants = [result(f"variant {n}", 5 + n / 8, Estimate(n / 8, 0.01, (n / 8,)) if n else None) for n in range(9)]
    text = page(*variants)
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(parsed.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & parsed.names
    assert not re.search(r"https?:|url\(|@import", text)
    words = text_of(text)
    for variant in variants:
        assert words.count(variant.name) >= 6 and variant.about in words


def test_figures_intervals_and_settings_are_on_the_page() -> None:
    words = text_of(page(result("first", 5.5), result("other", 5.25, Estimate(-0.25, 0.031, (-0.25,)))))
    for expected in (
        "5.5000 ± 0.0125",
        "\N{MINUS SIGN}0.2500 ± 0.0310",
        "2.6250 ± 0.0125",
        "12,345",
        "model.moe.top_k = 3",
        "3.50",
    ):
        assert expected in words
    assert "“other”, with 5.2500 nats per token" in words
    assert "1 of 1 intervals leave out 0" in words
    assert "2.25 times the mean load" in words


def test_an_interval_that_holds_zero_is_no_difference() -> None:
    words = text_of(page(result("first"), result("other", gap=Estimate(-0.25, 0.3, (-0.25,)))))
    assert "0 of 1 intervals leave out 0" in words


def test_one_seed_shows_no_interval() -> None:
    words = text_of(page(result("first", seeds=1), result("other", seeds=1, gap=Estimate(0.1, None, (0.1,)))))
    assert "±" not in words and "interval" not in words and "+0.1000" in words


def test_a_variant_that_looks_at_later_tokens_is_marked_and_cannot_win() -> None:
    words = text_of(page(result("first"), result("seer", 1.0, causal=False)))
    assert "seer *" in words and "cannot be compared" in words
    assert "“first”, with 5.0000" in words


def test_a_variant_without_experts_has_dashes_and_no_line() -> None:
    dense = result("dense", max_violation=Series("dense", [], []))
    known = ("loss", "bits_per_byte", "tokens_per_s")
    dense = replace(dense, figures={key: dense.figures[key] for key in known})
    assert "Who keeps the balance?" in page(result("first"), dense)
    assert "Who keeps the balance?" not in page(dense)


def test_names_and_settings_are_escaped() -> None:
    text = page(result(EVIL, sets={EVIL: EVIL}, about=EVIL), title=EVIL)
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text
    text.encode("utf-8")
    Page(text)


number = st.floats(-1e6, 1e6)


@given(
    st.lists(st.tuples(number, st.none() | st.floats(0, 1e6), st.lists(number, max_size=3)), min_size=1), st.booleans()
)
def test_every_mark_lies_inside_the_chart(rows: list, zero: bool) -> None:
    whiskers = [Whisker(f"row {n}", *row, n % 2 == 0, f"row {n}") for n, row in enumerate(rows)]
    drawn = whisker_chart(whiskers, "unit", zero=zero)
    places = [float(place) for place in re.findall(r'(?:cx|x1|x2)="([^"]*)%"', drawn)]
    assert places and all(0 <= place <= 100 for place in places)
    assert drawn.count('class="mark') == len(rows)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_does_not_break_the_page(value: float) -> None:
    broken = result("broken", figures={**result("x").figures, "loss": Estimate(value, None, (value,))})
    Page(page(result("first"), broken))
