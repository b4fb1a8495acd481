"""Experts over devices: reach and traffic against enumeration, and DeepSeek-V3's own deployment."""

import itertools
from collections.abc import Mapping
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import dense, preset

from moekit.config.errors import ConfigError
from moekit.plan.blueprint import Blueprint, Mixture, Weight
from moekit.plan.experts import reach
from moekit.plan.figure import Section
from moekit.plan.parallel import expert_parallel
from moekit.plan.precision import parse_precision
from moekit.plan.traffic import combine_bytes, dispatch_bytes

H800 = {"peer": 160e9, "network": 50e9}
"""Bytes/s of NVLink and InfiniBand by arXiv 2412.19437, section 3.2.2."""


def spread(
    blueprint: Blueprint,
    devices: int,
    per_node: int = 8,
    redundant: int = 0,
    tokens: int = 4096,
    links: Mapping[str, float] = H800,
    rate: float = 1e15,
    dtype: str = "fp8",
) -> Section:
    return expert_parallel(blueprint, parse_precision(dtype), devices, per_node, redundant, tokens, links, rate)


def choices(n_routed: int, top_k: int, n_groups: int, top_k_groups: int) -> list[tuple[int, ...]]:
    """The expert sets of a token, each as often as groups of experts that hold it are chosen."""
    size = n_routed // n_groups
    return [
        experts
        for groups in itertools.combinations(range(n_groups), top_k_groups)
        for experts in itertools.combinations([g * size + e for g in groups for e in range(size)], top_k)
    ]


@given(st.data())
def test_reach_is_the_mean_and_the_maximum_over_all_choices(data: st.DataObject) -> None:
    n_groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    top_k_groups = data.draw(st.integers(1, n_groups))
    top_k = data.draw(st.integers(1, min(4, top_k_groups * size)))
    n_places = data.draw(st.integers(1, n_groups * size))
    places = [expert * n_places // (n_groups * size) for expert in range(n_groups * size)]
    found = [len({places[e] for e in taken}) for taken in choices(n_groups * size, top_k, n_groups, top_k_groups)]
    reached = reach(places, top_k, n_groups, top_k_groups)
    assert reached.expected == pytest.approx(sum(found) / len(found), rel=1e-12)
    aligned = n_places % n_groups == 0 or n_groups % n_places == 0
    assert reached.most == max(found) if aligned else reached.most >= max(found)


def test_reach_without_limits_is_hypergeometric() -> None:
    reached = reach([expert // 4 for expert in range(256)], 8)
    assert reached.expected == pytest.approx(64 * (1 - comb(252, 8) / comb(256, 8)), rel=1e-12)


def test_reach_of_nodes_that_are_groups_is_hypergeometric_in_the_open_groups() -> None:
    reached = reach([expert // 32 for expert in range(256)], 8, 8, 4)
    assert reached.expected == pytest.approx(4 * (1 - comb(96, 8) / comb(128, 8)), rel=1e-12)


def test_a_token_of_deepseek_v3_goes_to_4_nodes_at_most_but_to_8_devices() -> None:
    section = spread(preset("deepseek-v3"), 64)
    assert section.value("reach.nodes_max") == 4
    assert section.value("reach.devices_max") == 8
    assert section.value("reach.nodes_max_unlimited") == 8
    for place in ("devices", "nodes"):
        limited, free = (section.value(f"reach.{place}_expected{suffix}") for suffix in ("", "_unlimited"))
        assert limited < free


def test_a_token_of_deepseek_v2_goes_to_3_of_8_devices_at_most() -> None:
    section = spread(preset("deepseek-v2"), 8)
    assert (section.value("reach.devices_max"), section.value("reach.devices_max_unlimited")) == (3, 6)
    assert section.value("reach.nodes_max") == 1


def test_deepseek_v3_reads_prompts_with_8_experts_and_a_redundant_one_on_each_device() -> None:
    # arXiv 2412.19437, section 3.4.1: 4 nodes of 8, 32 redundant experts.
    section = spread(preset("deepseek-v3"), 32, redundant=32)
    assert section.value("experts_per_device") == 8
    assert section.value("redundant_per_device") == 1
    assert section.value("reach.nodes_max") == 4


def test_deepseek_v3_generates_with_an_expert_on_each_device() -> None:
    # arXiv 2412.19437, section 3.4.2: 40 nodes of 8; 64 devices hold redundant and shared experts.
    section = spread(preset("deepseek-v3"), 320, redundant=64, tokens=128)
    assert section.value("experts_per_device") == 1
    assert section.value("redundant_per_device") == 0
    assert section.value("devices_without_own") == 64
    assert section.value("reach.devices_expected") == pytest.approx(8, rel=1e-12)
    # The 256 devices with an expert of their own are 32 nodes.
    nodes = 32 * (1 - comb(248, 8) / comb(256, 8))
    assert section.value("reach.nodes_expected_unlimited") == pytest.approx(nodes, rel=1e-12)


def test_a_token_of_deepseek_v3_could_take_13_experts_at_the_same_cost() -> None:
    # arXiv 2412.19437, section 3.2.2: 3.2 experts of each node on average, 4 nodes.
    section = spread(preset("deepseek-v3"), 64)
    assert section.value("free_experts_per_node") == pytest.approx(3.2)
    assert round(section.value("free_experts")) == 13


def test_a_token_travels_in_fp8_with_scales_and_returns_in_bfloat16() -> None:
    assert dispatch_bytes(7168) == 7168 + 56 * 4
    assert dispatch_bytes(129) == 129 + 2 * 4
    assert combine_bytes(7168) == 2 * 7168


@pytest.mark.parametrize(
    ("devices", "per_node", "groups"), [(4, 2, (4, 2)), (4, 2, (1, 1)), (8, 2, (2, 1)), (8, 4, (1, 1)), (3, 8, (1, 1))]
)
def test_bytes_sent_are_the_mean_over_all_tokens(devices: int, per_node: int, groups: tuple[int, int]) -> None:
    blueprint = small(8, 3, *groups)
    section = spread(blueprint, devices, per_node)
    per_node = min(per_node, devices)
    copies = dict.fromkeys(("inside", "across", "inside_naive", "across_naive"), 0)
    starts = list(itertools.product(range(devices), choices(8, 3, *groups)))
    for start, experts in starts:
        targets = {expert * devices // 8 for expert in experts}
        node, place = divmod(start, per_node)
        for reached in {target // per_node for target in targets}:
            entry = reached * per_node + place
            copies["across"] += reached != node
            copies["inside"] += len({t for t in targets if t // per_node == reached} - {entry})
        copies["across_naive"] += sum(target // per_node != node for target in targets)
        copies["inside_naive"] += sum(target // per_node == node for target in targets - {start})
    for way, count in copies.items():
        for direction, size in (("dispatch", dispatch_bytes(64)), ("combine", combine_bytes(64))):
            found = section.value(f"{direction}.bytes_per_token_{way}")
            assert found == pytest.approx(size * count / len(starts), rel=1e-12)


def small(n_routed: int, top_k: int, n_groups: int = 1, top_k_groups: int = 1) -> Blueprint:
    experts = Weight("routed", "experts", (96, 64), 2 * n_routed, 2 * top_k)
    mixture = Mixture(2, n_routed, top_k, 96 * 64, 5000, n_groups, top_k_groups)
    return Blueprint("small", "none", 64, 100, 2, 100, (experts,), (), (mixture,))


def test_forwarding_inside_sends_less_across_nodes_than_straight_ways() -> None:
    section = spread(preset("deepseek-v3"), 64)
    for direction in ("dispatch", "combine"):
        across = section.value(f"{direction}.bytes_per_token_across")
        assert across < section.value(f"{direction}.bytes_per_token_across_naive") / 2


def test_times_are_bytes_over_links_and_the_slower_link_counts() -> None:
    section = spread(preset("deepseek-v3"), 64, tokens=1000)
    total = 0.0
    for direction in ("dispatch", "combine"):
        inside, across = (1000 * section.value(f"{direction}.bytes_per_token_{way}") for way in ("inside", "across"))
        assert section.value(f"time.{direction}_inside_seconds") == pytest.approx(inside / 160e9)
        assert section.value(f"time.{direction}_across_seconds") == pytest.approx(across / 50e9)
        total += max(inside / 160e9, across / 50e9)
    assert section.value("time.total_seconds") == pytest.approx(total)


@pytest.mark.parametrize("rate", [1e12, 1e14, 1e16])
def test_what_the_shared_expert_does_not_hide_is_visible(rate: float) -> None:
    section = spread(preset("deepseek-v3"), 64, rate=rate)
    shared = 2 * 44_040_192 * 4096 / rate
    assert section.value("hidden.shared_seconds") == pytest.approx(shared)
    visible = section.value("hidden.visible_seconds")
    assert visible == pytest.approx(max(0.0, section.value("time.total_seconds") - shared))
    assert section.value("hidden.seconds") + visible == pytest.approx(section.value("time.total_seconds"))
    assert section.value("hidden.visible_seconds_all_layers") == 58 * visible


def test_the_devices_together_hold_all_experts_once() -> None:
    # 653.9B parameters in FP8, and a float32 scale for each block of 128 x 128.
    section = spread(preset("deepseek-v3"), 64)
    numbers = 58 * 256 * 44_040_192
    assert 64 * section.value("expert_bytes_per_device") == numbers + 4 * numbers // 128**2
    doubled = spread(preset("deepseek-v3"), 64, redundant=256)
    assert doubled.value("expert_bytes_per_device") == 2 * section.value("expert_bytes_per_device")


def test_every_choice_gives_a_row() -> None:
    section = spread(preset("deepseek-v3"), 320, tokens=100)
    assert section.value("rows_per_expert") * 256 == 320 * 100 * 8


def test_one_node_needs_no_network_and_several_do() -> None:
    alone = spread(preset("deepseek-v3"), 8, links={"peer": 160e9})
    assert alone.value("time.dispatch_across_seconds") == 0
    assert alone.value("time.total_seconds") > 0
    many = spread(preset("deepseek-v3"), 16, links={"peer": 160e9})
    assert many.value("time.total_seconds") is None
    assert spread(preset("deepseek-v3"), 1, links={}).value("time.total_seconds") == 0


def test_a_model_without_experts_has_nothing_to_spread() -> None:
    section = spread(dense(), 8)
    assert not section.figures
    assert "nothing to spread" in section.notes[0]


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("devices", {"devices": 0}),
        ("devices", {"devices": 12}),
        ("devices", {"devices": 10**9}),
        ("per_node", {"devices": 8, "per_node": 0}),
        ("redundant", {"devices": 8, "redundant": -1}),
        ("tokens", {"devices": 8, "tokens": 0}),
        ("rate", {"devices": 8, "rate": 0.0}),
    ],
)
def test_sizes_that_cannot_be_are_named(key: str, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        spread(preset("deepseek-v3"), **changes)
