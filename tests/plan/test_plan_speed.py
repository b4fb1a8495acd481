"""Bounds of speed: bytes and FLOPs against published counts, and the laws they obey."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import card, dense, preset

from moekit.config.errors import ConfigError
from moekit.plan.blueprint import Blueprint, Mixture, Weight
from moekit.plan.devices import Device, device_named
from moekit.plan.experts import distinct_experts, rows_per_expert
from moekit.plan.figure import Section
from moekit.plan.fit import read_per_token
from moekit.plan.memory import kv_cache
from moekit.plan.precision import FORMATS, parse_precision
from moekit.plan.sources import blueprint_from
from moekit.plan.speed import speed
from moekit.plan.step import decode_step, forward_step, least_time

BFLOAT16 = FORMATS["bfloat16"]


def bounds(
    blueprint: Blueprint,
    device: Device | None = None,
    dtype: str = "bfloat16",
    context: int = 1,
    batch: int = 1,
    prompt: int = 512,
    n_devices: int = 1,
) -> Section:
    return speed(blueprint, parse_precision(dtype), BFLOAT16, context, batch, prompt, device or card(), n_devices)


@given(st.integers(1, 6), st.data())
def test_distinct_experts_are_the_mean_over_all_choices(n_routed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_routed))
    sets = list(itertools.combinations(range(n_routed), top_k))
    tokens = data.draw(st.integers(1, 3 if len(sets) < 15 else 2))
    found = [len(set().union(*choice)) for choice in itertools.product(sets, repeat=tokens)]
    mean = sum(found) / len(found)
    assert distinct_experts(n_routed, top_k, tokens) == pytest.approx(mean, rel=1e-12)
    assert rows_per_expert(n_routed, top_k, tokens) == pytest.approx(tokens * top_k / mean, rel=1e-12)


def test_checking_two_tokens_of_deepseek_v3_reads_almost_twice_the_experts() -> None:
    assert distinct_experts(256, 8, 2) / 8 == pytest.approx(1.96875, rel=1e-14)


def test_no_batch_reads_more_experts_than_there_are() -> None:
    assert distinct_experts(256, 8, 10**12) == 256
    assert distinct_experts(8, 8, 1) == 8


# Active parameters without the input embedding and numbers cached for a token: the model cards and arXiv 2405.04434,
# 2412.19437 (tables of KV cache); float32 selection biases of DeepSeek-V3 (58 layers x 256) take two bytes more each.
@pytest.mark.parametrize(
    ("name", "active", "width", "cached", "more"),
    [
        ("deepseek-v2-lite", 2_451_435_008, 2048, 15_552, 0),
        ("deepseek-v2", 20_851_512_320, 5120, 34_560, 0),
        ("deepseek-v3", 36_625_618_432, 7168, 35_136, 2 * 58 * 256),
        ("mixtral-8x7b", 12_748_853_248, 4096, 65_536, 0),
        ("olmoe-1b-7b", 1_178_994_688, 2048, 65_536, 0),
    ],
)
def test_one_token_reads_its_active_parameters_its_row_and_its_cache(
    name: str, active: int, width: int, cached: int, more: int
) -> None:
    section = bounds(preset(name), context=1000)
    assert section.value("decode.bytes") == pytest.approx(2 * (active + width + 1000 * cached) + more, rel=1e-12)


def test_a_token_of_deepseek_v3_takes_464_experts() -> None:
    section = bounds(preset("deepseek-v3"), dtype="int4")
    assert section.value("token.experts") == 8 * 58
    assert section.value("token.expert_parameters") == 464 * 44_040_192  # 20.4B
    assert section.value("token.expert_bytes") == 464 * 44_040_192 * 9 // 16  # 4.5 bits: 11.5 GB


# arXiv 2505.09343, table 2: GFLOPs for each token in training at 4096, causal attention.
@pytest.mark.parametrize(("name", "published"), [("deepseek-v3", 250), ("deepseek-v2", 155)])
def test_training_takes_the_published_flops_for_a_token(name: str, published: int) -> None:
    section = bounds(preset(name), context=4096, batch=3)
    assert int(section.value("training.flops") / (3 * 4096) / 1e9) == published


def test_absorbed_decoding_costs_its_latent_widths_for_each_cached_token() -> None:
    one, more = (bounds(preset("deepseek-v3"), context=context).value("decode.flops") for context in (1, 1001))
    assert more - one == 1000 * 61 * 2 * 128 * (512 + 64 + 512)


@given(st.integers(1, 40), st.integers(1, 50), st.booleans())
def test_a_prompt_costs_the_pairs_of_tokens_that_see_each_other(length: int, window: int, causal: bool) -> None:
    whole = preset("mixtral-8x7b")
    attention = whole.attentions[0]._replace(window=window, causal=causal)
    only = whole._replace(weights=(), mixtures=(), attentions=(attention,))
    step = forward_step(only, parse_precision("bfloat16"), BFLOAT16, length, 2)
    seen = [min(at if causal else length, window) for at in range(1, length + 1)]
    assert step.all_flops == 2 * sum(seen) * 32 * 2 * 32 * (128 + 128)


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    whole = preset("mixtral-8x7b")
    windowed = whole._replace(attentions=(whole.attentions[0]._replace(window=100),))
    at_window = bounds(whole, context=100).value("decode.bytes")
    assert bounds(windowed, context=5000).value("decode.bytes") == at_window


def test_a_tied_head_is_read_like_one_of_its_own() -> None:
    untied = preset("olmoe-1b-7b")
    tied = untied._replace(weights=tuple(w._replace(count=0) if w.part == "head" else w for w in untied.weights))
    for key in ("decode.weight_bytes", "decode.flops"):
        assert bounds(tied).value(key) == bounds(untied).value(key)


def test_only_the_last_token_of_a_prompt_needs_logits() -> None:
    blueprint, precision = preset("olmoe-1b-7b"), parse_precision("bfloat16")
    last, every = (forward_step(blueprint, precision, BFLOAT16, 10, 3, n).all_flops for n in (1, 10))
    assert every - last == 2 * 50304 * 2048 * 3 * 9


def test_the_prediction_module_is_not_read() -> None:
    whole = preset("deepseek-v3")
    without = whole._replace(weights=tuple(w for w in whole.weights if w.part != "prediction"))
    assert bounds(whole).figures == bounds(without).figures


def test_the_time_is_the_longer_of_reading_and_computing_with_the_launches() -> None:
    blueprint = preset("deepseek-v2-lite")
    slow, fast = card(overhead=1e-5), card(rate=1e9, overhead=1e-5)
    for device, binding in ((slow, "memory"), (fast, "compute"), (card(overhead=1.0), "overhead")):
        section = bounds(blueprint, device, batch=7)
        terms = {key: section.value(f"decode.{key}_seconds") for key in ("memory", "compute", "overhead")}
        assert terms["overhead"] == 27 * device.overhead
        assert section.value("decode.seconds") == max(terms["memory"], terms["compute"]) + terms["overhead"]
        assert section.value("decode.bound_by") == binding == max(terms, key=lambda term: terms[term])
        assert section.value("decode.tokens_per_second") == 7 / section.value("decode.seconds")


def test_every_layer_is_launched_once_and_three_times_in_training() -> None:
    section = bounds(preset("deepseek-v2-lite"), card(overhead=1e-5), batch=7)
    launches = [section.value(f"{key}.overhead_seconds") / 1e-5 for key in ("decode", "prefill", "training")]
    assert launches == pytest.approx([27, 27, 3 * 27])


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen1.5-moe-a2.7b", "grok-1"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int4", "fp8,head=int8"])
def test_one_token_reads_what_the_other_sections_count(name: str, dtype: str) -> None:
    blueprint, precision = blueprint_from(name), parse_precision(dtype)
    read = bounds(blueprint, dtype=dtype, context=100).value("decode.bytes")
    cache = kv_cache(blueprint, BFLOAT16, 100, 1).value("total")
    assert read == pytest.approx(read_per_token(blueprint, precision) + cache, rel=1e-9)


def test_experts_of_several_kinds_have_sizes_of_their_own() -> None:
    kinds = (Mixture(2, 8, 2, 3 * 64 * 96, 0), Mixture(3, 4, 1, 3 * 64 * 32, 0))
    weights = tuple(
        Weight("routed", "experts", (m.expert // 64, 64), m.layers * m.n_routed, m.layers * m.top_k) for m in kinds
    )
    blueprint = Blueprint("two kinds", "none", 64, 100, 5, 100, weights, (), kinds)
    one, all_of_them = (bounds(blueprint, batch=batch) for batch in (1, 10**6))
    assert one.value("token.expert_bytes") == 2 * (2 * 2 * 3 * 64 * 96 + 3 * 1 * 3 * 64 * 32)
    assert one.value("decode.expert_bytes") == pytest.approx(one.value("token.expert_bytes"))
    assert all_of_them.value("decode.expert_bytes") == pytest.approx(2 * sum(weight.stored for weight in weights))


def test_more_devices_divide_the_time() -> None:
    alone, many = (bounds(preset("deepseek-v3"), context=4096, batch=32, n_devices=n) for n in (1, 16))
    for key in ("decode.seconds", "prefill.seconds", "training.seconds"):
        assert alone.value(key) / many.value(key) == pytest.approx(16)


def test_a_larger_batch_reads_less_for_each_token_and_is_never_slower_in_all() -> None:
    found = [bounds(preset("deepseek-v3"), context=500, batch=2**n) for n in range(14)]
    bytes_each = [section.value("decode.bytes_per_token") for section in found]
    rates = [section.value("decode.tokens_per_second") for section in found]
    assert bytes_each == sorted(bytes_each, reverse=True)
    assert rates == sorted(rates)


@pytest.mark.parametrize("device", ["rtx-4090", "h800", "ryzen-9-9950x"])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "mixtral-8x7b"])
def test_computing_overtakes_reading_exactly_at_the_break_even_batch(name: str, device: str) -> None:
    machine, blueprint = device_named(device), preset(name)
    found = bounds(blueprint, machine, "fp8", context=64).value("decode.break_even_batch")
    for batch, compute_longer in ((found - 1, False), (found, True)):
        time = least_time(decode_step(blueprint, parse_precision("fp8"), BFLOAT16, 64, batch), machine, 1, 0)
        assert (time.compute >= time.memory) == compute_longer


def test_there_is_no_break_even_where_the_cache_takes_longer_than_the_token() -> None:
    assert bounds(preset("olmoe-1b-7b"), context=4096).value("decode.break_even_batch") is None


def test_fp8_is_computed_at_its_own_rate_where_the_device_has_one() -> None:
    without = card()
    rates = {**without.rates, "fp8": 2 * without.rates["bfloat16"]}
    experts = preset("deepseek-v3")
    experts = experts._replace(weights=tuple(w for w in experts.weights if w.part == "routed"), attentions=())
    times = [bounds(experts, device, "fp8") for device in (without, without._replace(rates=rates))]
    slow, fast = (section.value("decode.compute_seconds") for section in times)
    assert slow == 2 * fast


def test_attention_scores_are_not_computed_in_fp8() -> None:
    whole = preset("deepseek-v3")
    scores = decode_step(whole._replace(weights=(), mixtures=()), parse_precision("fp8"), BFLOAT16, 100, 1)
    assert scores.flops.keys() == {"bfloat16"}
    assert decode_step(whole, parse_precision("float32"), BFLOAT16, 100, 1).flops.keys() == {"float32"}


def test_a_dense_model_of_equal_active_size_is_the_same_for_one_token_and_lighter_for_many() -> None:
    one, many = (bounds(preset("deepseek-v3"), batch=batch) for batch in (1, 64))
    assert one.value("dense_active.time_ratio") == pytest.approx(1)
    assert many.value("dense_active.time_ratio") < 0.2
    for section in (one, many):
        assert section.value("dense_active.flops_ratio") == 1


def test_a_dense_model_of_equal_total_size_reads_and_computes_all_that_is_stored() -> None:
    # DeepSeek-V2-Lite: 15,706,484,224 parameters, of which 209,715,200 are the input embedding.
    section = bounds(preset("deepseek-v2-lite"))
    own = 2048 + 15_552
    stored, active = 15_706_484_224 - 209_715_200 + own, 2_451_435_008 + own
    assert section.value("dense_total.time_ratio") == pytest.approx(stored / active, rel=1e-12)
    # Of 26 layers, a token takes 6 of 64 experts of 3 x 2048 x 1408 numbers each.
    more = section.value("dense_total.flops_ratio") * section.value("decode.flops") - section.value("decode.flops")
    assert more == pytest.approx(2 * 26 * (64 - 6) * 3 * 2048 * 1408, rel=1e-12)
    large = bounds(preset("deepseek-v2-lite"), card(rate=1e18), batch=1000)
    assert large.value("dense_total.time_ratio") == pytest.approx(1)


def test_what_was_measured_stays_below_the_bound() -> None:
    # arXiv 2412.19437, table 1: 180 thousand H800 hours for 10^12 tokens.
    section = bounds(preset("deepseek-v3"), device_named("h800"), "fp8", context=4096, batch=64)
    assert section.value("training.tokens_per_second") > 10**12 / (180e3 * 3600)
    # arXiv 2405.04434, section 3.2.3: above 50 thousand tokens/s on 8 H800.
    section = bounds(preset("deepseek-v2"), device_named("h800"), "fp8", context=2048, batch=2048, n_devices=8)
    assert section.value("decode.tokens_per_second") > 50_000


def test_a_model_without_experts_has_bounds_too() -> None:
    section = bounds(dense(), batch=4)
    assert section.value("decode.expert_bytes") == 0
    assert section.value("decode.tokens_per_second") > 0
    assert not [figure for figure in section.figures if figure.key.startswith(("token.", "dense_"))]


@pytest.mark.parametrize("size", [0, -1, 10**30])
@pytest.mark.parametrize("key", ["context", "batch", "prompt", "n_devices"])
def test_sizes_that_are_none_are_named(key: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        bounds(dense(), **{key: size})  # type: ignore[arg-type]


def test_every_figure_is_finite_at_the_largest_sizes() -> None:
    section = bounds(preset("deepseek-v3"), context=10**12, batch=10**12, prompt=10**12)
    numbers = [figure.value for figure in section.figures if isinstance(figure.value, int | float)]
    assert all(math.isfinite(value) for value in numbers)
