"""A study answers what was asked, in the order in which it is read; sweeps vary one thing; values become words."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.config.errors import ConfigError
from moekit.config.presets.load import load_run, preset_names
from moekit.plan.blueprint import Blueprint
from moekit.plan.devices import device_named
from moekit.plan.figure import Figure, Section, as_json
from moekit.plan.from_config import blueprint_of
from moekit.plan.headlines import HEADLINES, side_by_side, summary
from moekit.plan.layout import Layout
from moekit.plan.precision import parse_precision
from moekit.plan.study import Host, Recipe, Request, study
from moekit.plan.sweep import LARGEST, sweep
from moekit.plan.words import brief, labelled, words


def blueprint(name: str, quantisation: str | None = None) -> Blueprint:
    return blueprint_of(load_run(name).model, name, name, quantisation)


def keys(sections: tuple[Section, ...]) -> list[str]:
    return [section.key for section in sections]


H100 = device_named("h100-sxm")


def test_a_device_adds_its_sections_and_experts_over_devices_one_more() -> None:
    model = blueprint("deepseek-v3")
    alone = ["parameters", "kv_cache", "memory", "compute"]
    assert keys(study(model, Request())) == alone
    assert keys(study(model, Request(device=H100))) == [*alone, "fit", "speed", "offload"]
    assert keys(study(model, Request(device=H100, n_devices=8))) == [*alone, "fit", "speed"]
    spread = Request(device=H100, n_devices=8, layout=Layout(expert=8))
    assert keys(study(model, spread)) == [*alone, "fit", "speed", "parallel"]


def test_what_is_not_asked_is_what_the_source_stores_at_the_models_own_context() -> None:
    assert Request().precision_of(blueprint("deepseek-v3", "fp8")).name == "fp8"
    assert Request().precision_of(blueprint("mixtral-8x7b")).name == "bfloat16"
    # gpt-oss stores its experts alone in MXFP4.
    assert Request().precision_of(blueprint("tiny", "mxfp4")).name == "bfloat16,routed=mxfp4"
    assert Request(precision=parse_precision("int8")).precision_of(blueprint("tiny", "fp8")).name == "int8"
    with pytest.raises(ConfigError, match="iq2_xxs"):
        Request().precision_of(blueprint("tiny", "iq2_xxs"))
    assert Request().context_of(blueprint("deepseek-v3")) == 4096
    assert Request().context_of(blueprint("tiny")) == load_run("tiny").model.max_positions < 4096
    assert Request(context=9000).context_of(blueprint("tiny")) == 9000


def test_training_needs_more_memory_and_a_step_is_whole_batches() -> None:
    model = blueprint("tiny")
    memory = study(model, Request(recipe=Recipe("adamw", 4 * 2 * 64), batch=2, context=64))[2]
    assert memory.value("training.total") > memory.value("total")
    assert Request(recipe=Recipe("adamw", 4 * 2 * 64), batch=2, context=64).training_of(model).micro_batches == 4  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="tokens_per_step"):
        study(model, Request(recipe=Recipe("adamw", 100), batch=2, context=64))
    assert Request().training_of(model) is None


def test_more_experts_fit_into_more_main_memory() -> None:
    model = blueprint("deepseek-v3", "fp8")
    slots = []
    for ram in (None, 128 * 10**9, 10**12):
        offload = study(model, Request(device=device_named("rtx-4090"), host=Host(ram=ram)))[-1]
        slots.append(offload.value("slots.ram"))
    assert slots[0] < slots[1] < slots[2]


@pytest.mark.parametrize("key", ["context", "batch", "prompt", "n_devices", "tokens"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_an_error_that_names_it(key: str, value: int) -> None:
    with pytest.raises(ConfigError) as error:
        Request(**{key: value})
    assert error.value.key == key


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_hit_rate_is_a_share(rate: float) -> None:
    with pytest.raises(ConfigError, match="hit_rate"):
        Request(host=Host(hit_rate=rate))


@pytest.mark.parametrize("name", preset_names())
def test_every_headline_is_a_figure_of_some_study_and_keys_are_unique(name: str) -> None:
    device = device_named("h100-sxm")
    for request in (Request(device=device), Request(device=device, layout=Layout(expert=8), recipe=Recipe())):
        for section in study(blueprint(name), request):
            found = [figure.key for figure in section.figures]
            assert len(set(found)) == len(found), section.key
            assert len({label for label, _ in labelled(section.figures)}) == len(found), section.key
            assert section.key in HEADLINES
            assert summary(section).figures


def test_no_headline_names_a_figure_that_does_not_exist() -> None:
    request = Request(device=H100, layout=Layout(expert=8, data=8), recipe=Recipe(), tokens=10**12)
    answered = {
        section.key: {figure.key for figure in section.figures} for section in study(blueprint("deepseek-v3"), request)
    }
    assert {key: set(wanted) - answered[key] for key, wanted in HEADLINES.items()} == {key: set() for key in HEADLINES}


def test_json_is_nested_by_the_dots_of_the_keys() -> None:
    found = as_json(study(blueprint("deepseek-v3"), Request()))
    # arXiv 2412.19437: 671B; the prediction module adds 11.6B; a token's cache is 70.272 KB in bfloat16.
    assert found["parameters"]["stored"]["without_prediction"] == 671_026_419_200
    assert found["parameters"]["active"]["all"] == 37_552_297_472
    assert found["kv_cache"]["bytes_per_token"] == 70_272


def test_models_side_by_side_have_a_row_for_each_headline_that_one_of_them_has() -> None:
    names = ("deepseek-v3", "mixtral-8x7b")
    comparison = side_by_side([(name, study(blueprint(name), Request())) for name in names])
    assert comparison.names == names
    stored = next(row for row in comparison.rows if row.label == "parameters: stored")
    assert [figure.value for figure in stored.figures if figure is not None] == [682_636_487_424, 46_702_792_704]
    assert len({row.label for row in comparison.rows}) == len(comparison.rows)


def test_more_routed_experts_are_more_to_store_and_as_much_to_compute() -> None:
    config = load_run("mixtral-8x7b").model
    found = [study(blueprint_of(c, name, "x"), Request())[0] for name, c in sweep(config, "n_routed=8,16,32")]
    routed = [section.value("stored.routed") for section in found]
    assert routed[1] == 2 * routed[0] and routed[2] == 4 * routed[0]
    assert len({section.value("active_by_part.routed") for section in found}) == 1


def test_finer_experts_are_as_much_to_store_and_to_compute_but_many_more_sets() -> None:
    config = load_run("mixtral-8x7b").model
    found = [study(blueprint_of(c, name, "x"), Request())[0] for name, c in sweep(config, "granularity=1,2,4")]
    for key in ("stored.routed", "active_by_part.routed"):
        assert len({section.value(key) for section in found}) == 1
    # arXiv 2401.06066, section 3.1: top 2 of 8, 4 of 16, 8 of 32.
    assert [section.value("combinations") for section in found] == [28, 1820, 10_518_300]


@pytest.mark.parametrize("key", ["top_k", "expert_width", "n_shared", "width", "vocab_size", "n_layers", "n_heads"])
def test_a_swept_field_is_the_only_one_that_changes(key: str) -> None:
    config = load_run("olmoe-1b-7b").model
    ((name, changed),) = sweep(config, f"{key}=16")
    assert name == "16"
    section = config.moe if key in ("top_k", "expert_width", "n_shared") else config
    if key == "n_heads":
        assert changed == replace(config, attention=replace(config.attention, n_heads=16))
    elif section is config:
        assert changed == replace(config, **{key: 16})
    else:
        assert changed == replace(config, moe=replace(config.moe, **{key: 16}))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("n_routd=8", "n_routd"),
        ("n_routed", "is no sweep"),
        ("n_routed=", "is no sweep"),
        ("n_routed=8,,9", "is no sweep"),
        ("=8", "''"),
        ("n_routed=8,8", "twice"),
        ("n_routed=0", "n_routed=0"),
        ("n_routed=-8", "n_routed=-8"),
        ("n_routed=x", "whole number"),
        ("n_routed=8.5", "whole number"),
        ("top_k=99", "n_routed = 8"),
        ("granularity=3", "does not divide"),
        ("granularity=0", "granularity=0"),
        (f"n_layers={LARGEST + 1}", "at most"),
        ("n_layers=" + "9" * 5000, "at most"),
        ("n_routed=" + ",".join(map(str, range(8, 28))), "the most"),
        ("moe.width=8", "moe.width"),
        ("norm_epsilon=1", "norm_epsilon"),
    ],
)
def test_a_sweep_that_cannot_be_is_an_error_that_says_why(wanted: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep(load_run("mixtral-8x7b").model, wanted)
    assert error.value.key == "sweep"
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("value", "unit", "text", "short"),
    [
        (671_026_419_200, "", "671,026,419,200 (671.0B)", "671.0B"),
        (999_999, "", "999,999", "999,999"),
        (335_513_209_600, "B", "335.5 GB", "335.5 GB"),
        (999_960, "B", "1.0 MB", "1.0 MB"),
        (999.0, "B", "999 bytes", "999 bytes"),
        (1000, "B", "1.0 kB", "1.0 kB"),
        (0.0142, "s", "14.2 ms", "14.2 ms"),
        (90.0, "s", "1.5 minutes", "1.5 minutes"),
        (0, "s", "0 s", "0 s"),
        (73_000_000_000, "FLOP", "73.0 GFLOP", "73.0 GFLOP"),
        (12.345, "%", "12.3 %", "12.3 %"),
        (math.inf, "tokens/s", "without bound", "without bound"),
        (10**30 // 3, "", "3.333e29", "3.333e29"),
        (True, "", "yes", "yes"),
        (None, "", "none", "none"),
        ("weights", "", "weights", "weights"),
    ],
)
def test_a_value_is_written_as_people_write_it(
    value: float | int | str | bool | None, unit: str, text: str, short: str
) -> None:
    figure = Figure("key", "label", value, unit)
    assert (words(figure), brief(figure)) == (text, short)


@given(st.integers(-(10**30), 10**30), st.sampled_from(["", "B", "FLOP", "s", "%", "tokens"]))
def test_words_of_a_whole_number_keep_its_size(value: int, unit: str) -> None:
    text = words(Figure("key", "label", value, unit))
    assert ("-" in text.split("e")[0]) == (value < 0)
    if unit in ("", "tokens") and abs(value) < 10**18:
        assert f"{value:,}" in text
