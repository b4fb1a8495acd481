"""The page is one well-formed file, safe to open, and says what report.json says."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import expert_layer, metrics_row

from moekit.report import Compression, Report, Sample, render, to_json
from moekit.report.charts.scale import fixed, number

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The tags, attributes and text of a page whose tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def words(text: str) -> str:
    return " ".join(Page(text).text)


def test_tags_balance_and_headings_descend_one_level_at_a_time(report):
    levels = [int(tag[1]) for tag in Page(render(report)).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_a_page_refers_to_nothing_outside_itself(report):
    text = render(report)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import", text)


EVIL = "<script>alert('1')</script>&\"\x00\x1b\ud800\u202e</pre>"


def test_every_text_from_outside_is_escaped(report):
    evil = Report(
        title=EVIL,
        facts=[(EVIL, EVIL)],
        compression=[Compression(domain=EVIL, bits_per_byte=1.0)],
        metrics=[metrics_row(1, 3.0, validation={EVIL: {"bits_per_byte": 1.0}}, losses={EVIL: 1.0})],
        experts=replace(report.experts, domains=(EVIL, EVIL + "2")),
        samples=[Sample(domain=EVIL, prompt=EVIL, continuation=EVIL)],
    )
    text = render(evil)
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text
    assert len(text.encode("utf-8")) > 0
    json.dumps(to_json(evil), allow_nan=False)


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_sample_of_any_text_renders(prompt, continuation):
    text = render(Report(title=prompt, samples=[Sample(domain=continuation, prompt=prompt, continuation=continuation)]))
    Page(text)
    text.encode("utf-8")


def test_a_samples_text_survives_the_page(report):
    sample = Sample(domain="code", prompt="\nif a < b && c:", continuation='\n\tprint("吾輩は猫である")\n')
    page = Page(render(replace(report, samples=[sample])))
    assert sample.prompt in page.text and sample.continuation in page.text


def test_numbers_on_the_page_equal_those_of_the_record(report):
    text, record = words(render(report)), to_json(report)
    for row in [*record["compression"]["domains"], record["compression"]["average"]]:
        for key in ("bits_per_byte", "gzip", "xz"):
            assert fixed(math.nan if row[key] is None else row[key], 3) in text
    for layer in record["experts"]["layers"]:
        for key in ("divergence", "shuffled_mean", "shuffled_p95"):
            assert fixed(layer[key], 4) in text
        assert number(layer["max_violation"], 4) in text and number(layer["entropy"], 4) in text
    training = record["training"]
    for series in [*training["loss"], *training["balance_losses"], *training["validation"], *training["max_violation"]]:
        assert series["name"] in text
        assert number(series["values"][0], 4) in text and number(series["values"][-1], 4) in text
    assert all(fact["label"] in text and fact["value"] in text for fact in record["facts"])
    assert all(sample["continuation"] in text for sample in record["samples"])


def test_what_a_table_of_a_long_run_shows_is_in_the_record(report):
    rows = [metrics_row(step, 8 / step**0.2) for step in range(1, 3001)]
    long = replace(report, metrics=rows, experts=None)
    (series, *_) = to_json(long)["training"]["loss"]
    known = {(number(step), number(value, 4)) for step, value in zip(series["steps"], series["values"], strict=True)}
    shown = re.findall(r'<tr><th scope="row">([\d,]+)</th><td class="number">([\d.]+)</td>', render(long))
    assert len(shown) >= 24 and set(shown[:24]) <= known


def test_the_record_is_json_without_nan(report):
    assert json.loads(json.dumps(to_json(report), allow_nan=False)) == to_json(report)


def test_every_chart_is_a_figure_with_a_question(report):
    text = render(report)
    figures = re.findall(r"<figure><figcaption><h3>([^<]*)</h3><p>", text)
    assert len(figures) == text.count("<figure>") == 8
    assert all(question.endswith("?") for question in figures)


def test_an_empty_report_renders():
    assert "nothing to show" in render(Report(title="empty"))


def test_what_a_run_does_not_have_is_left_out(report):
    text = render(Report(title="dense", metrics=[{"step": 1, "loss": 3.0, "layers": []}]))
    assert "Does it still learn?" in text
    assert "balanced" not in text and "experts" not in words(text)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0, -1.0])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_a_run_of_any_length_with_any_number_renders(report, bad, steps):
    layers = [{"layer": 1, "max_violation": bad, "entropy": bad, "dead_experts": 0}]
    valid = {"code": {"loss": bad, "bits_per_byte": bad}}
    values = {"loss": bad, "lr": bad, "gradient_norm": bad, "tokens_per_s": bad, "layers": layers, "validation": valid}
    rows = [{**metrics_row(step, 3.0), "losses": {"next_token": bad}, **values} for step in range(1, steps + 1)]
    compression = [Compression(domain="code", bits_per_byte=bad, gzip=bad, xz=bad)]
    for metrics in (rows, [*rows, metrics_row(steps + 1, 3.0)]):
        changed = replace(report, metrics=metrics, compression=compression)
        text = render(changed)
        Page(text)
        assert not re.search(r'="[^"]*\b(nan|inf)\b', text)
        json.dumps(to_json(changed), allow_nan=False)


def test_layers_without_load_and_a_single_domain_render(report):
    one = replace(expert_layer(1, [0, 0]), share=[[0.0, 0.0]], pairwise=[[0.0]], shuffled_mean=math.nan)
    use = replace(report.experts, domains=("text",), tokens=(0,), layers=[one])
    Page(render(replace(report, experts=use)))


def test_a_large_model_and_a_long_run_stay_a_small_page(report):
    rows = [metrics_row(step, 3.0 + step % 7) for step in range(1, 2_001)]
    layers = [expert_layer(layer, list(range(64))) for layer in range(20)]
    text = render(replace(report, metrics=rows, experts=replace(report.experts, layers=layers)))
    assert len(text) < 2_000_000
    assert max(len(series["values"]) for series in to_json(replace(report, metrics=rows))["training"]["loss"]) <= 600
