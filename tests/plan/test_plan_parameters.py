"""Stored and active parameters, and how many sets of experts there are, to the digit."""

from itertools import combinations
from math import comb
from typing import Any

import pytest

from moekit.plan.figure import as_json
from moekit.plan.parameters import combinations_within_groups, parameters
from moekit.plan.sources import blueprint_from, preset_names

# Equal to the numbers of the released files on the hub: stored without prediction, one expert; and what the conventions
# of the publishers count as active: everything, without the input embedding, with neither embedding nor head.
RELEASED = {
    "deepseek-moe-16b": (16_375_728_128, 8_650_752, 2_828_650_496, 2_618_935_296, 2_409_220_096),
    "deepseek-v2-lite": (15_706_484_224, 8_650_752, 2_661_150_208, 2_451_435_008, 2_241_719_808),
    "deepseek-v2": (235_741_434_880, 23_592_960, 21_375_800_320, 20_851_512_320, 20_327_224_320),
    "deepseek-v3": (671_026_419_200, 44_040_192, 37_552_297_472, 36_625_618_432, 35_698_939_392),
    "mixtral-8x7b": (46_702_792_704, 176_160_768, 12_879_925_248, 12_748_853_248, 12_617_781_248),
    "olmoe-1b-7b": (6_919_161_856, 6_291_456, 1_282_017_280, 1_178_994_688, 1_075_972_096),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 8_650_752, 2_689_173_504, 2_378_008_576, 2_066_843_648),
    "qwen3-30b-a3b": (30_532_122_624, 4_718_592, 3_353_032_704, 3_041_867_776, 2_730_702_848),
}

KEYS = (
    "stored.without_prediction",
    "per_expert",
    "active.all",
    "active.without_input_embedding",
    "active.without_embeddings",
)


def value(name: str, key: str) -> Any:
    return parameters(blueprint_from(name)).value(key)


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_counts_to_the_digit(name: str) -> None:
    figures = parameters(blueprint_from(name))
    assert tuple(figures.value(key) for key in KEYS) == RELEASED[name]


# Parameters of the attention in one layer.
@pytest.mark.parametrize(
    ("name", "layers", "each"),
    [
        ("deepseek-moe-16b", 28, 16_777_216),
        ("deepseek-v2-lite", 27, 13_763_072),
        ("deepseek-v2", 60, 149_227_520),
        ("deepseek-v3", 61, 187_107_328),
        ("mixtral-8x7b", 32, 41_943_040),
        ("olmoe-1b-7b", 16, 16_781_312),
        ("qwen1.5-moe-a2.7b", 24, 16_783_360),
        ("qwen3-30b-a3b", 48, 18_874_624),
        ("grok-1", 64, 88_080_384),
    ],
)
def test_attention_counts_to_the_digit(name: str, layers: int, each: int) -> None:
    assert value(name, "stored.attention") == layers * each


# The release of DeepSeek-V3 lists 684,531,386,000 numbers: weights, copies, and the scales of FP8 blocks.
def test_the_files_of_deepseek_v3_add_up() -> None:
    figures = parameters(blueprint_from("deepseek-v3"))
    assert figures.value("stored.prediction") == 11_610_068_224
    assert figures.value("stored.total") == 682_636_487_424
    assert figures.value("stored.total") + figures.value("stored.file_copies") == 684_489_845_504
    assert figures.value("stored.block_scales") == 41_540_496
    assert 684_489_845_504 + 41_540_496 == 684_531_386_000


def test_a_tied_matrix_counts_once_and_stays_where_it_is_multiplied() -> None:
    embedding = 131072 * 6144
    assert value("grok-1", "active.all") == 83_756_587_008
    assert value("grok-1", "active.without_input_embedding") == 83_756_587_008
    assert value("grok-1", "active.without_embeddings") == 83_756_587_008 - embedding
    assert value("grok-1", "stored.head") == 0


@pytest.mark.parametrize("name", preset_names())
def test_parts_make_up_the_whole(name: str) -> None:
    found = as_json([parameters(blueprint_from(name))])["parameters"]
    beside = {"total", "without_prediction", "file_copies", "block_scales"}
    parts = {key: count for key, count in found["stored"].items() if key not in beside}
    assert sum(parts.values()) == found["stored"]["total"]
    assert found["stored"]["total"] - parts.get("prediction", 0) == found["stored"]["without_prediction"]
    assert sum(found["active_by_part"].values()) == found["active"]["all"]
    assert all(type(count) is int for count in [*parts.values(), *found["active_by_part"].values()])
    assert all(count <= parts[part] for part, count in found["active_by_part"].items())


@pytest.mark.parametrize("name", preset_names())
def test_the_numbers_of_a_figure_give_its_value(name: str) -> None:
    figures = parameters(blueprint_from(name)).figures
    checked = [figure for figure in figures if figure.key.startswith(("stored.", "active")) and figure.numbers]
    for figure in checked:
        product = figure.numbers.replace(",", "").replace(" x ", " * ")
        assert eval(product) == figure.value, figure
    assert len(checked) > 5


# arXiv 2401.06066, section 3.1: 120 sets become 4,426,165,368 when each of 16 experts is split into four.
@pytest.mark.parametrize(
    ("n_routed", "top_k", "expected"),
    [(16, 2, 120), (64, 8, 4_426_165_368), (64, 6, 74_974_368), (256, 8, 409_663_695_276_000), (60, 4, 487_635)],
)
def test_without_limits_every_set_is_reached(n_routed: int, top_k: int, expected: int) -> None:
    assert combinations_within_groups(n_routed, top_k, 1, 1) == expected == comb(n_routed, top_k)
    assert combinations_within_groups(n_routed, top_k, n_routed // 4, n_routed // 4) == expected


def by_hand(n_routed: int, top_k: int, n_groups: int, top_k_groups: int) -> int:
    size = n_routed // n_groups
    sets = combinations(range(n_routed), top_k)
    return sum(len({expert // size for expert in chosen}) <= top_k_groups for chosen in sets)


def test_sets_within_groups_are_those_one_can_list() -> None:
    for n_groups, size in ((2, 3), (3, 4), (4, 3), (6, 2), (5, 1)):
        for top_k in range(1, min(n_groups * size, 5) + 1):
            for limit in range(1, n_groups + 1):
                given = n_groups * size, top_k, n_groups, limit
                assert combinations_within_groups(*given) == by_hand(*given), given


def test_deepseek_v3_reaches_a_sixth_of_its_sets() -> None:
    """Coefficients of ((1 + x)^32 - 1)^m count the sets that touch m given groups."""
    power, reached = [1], 0
    once = [0] + [comb(32, k) for k in range(1, 9)]
    for m in range(1, 5):
        power = [sum(power[j] * once[k - j] for j in range(min(k, len(power) - 1) + 1)) for k in range(9)]
        reached += comb(8, m) * power[8]
    assert value("deepseek-v3", "combinations") == 409_663_695_276_000
    assert value("deepseek-v3", "combinations_within_groups") == reached
    assert round(409_663_695_276_000 / reached) == 6


def test_the_share_that_is_active_leaves_the_prediction_module_out() -> None:
    assert value("deepseek-v3", "active.share") == 100 * 37_552_297_472 / 671_026_419_200


def test_every_figure_says_how_it_is_computed() -> None:
    figures = parameters(blueprint_from("deepseek-v3")).figures
    assert all(figure.formula or figure.note for figure in figures)
    assert len({figure.key for figure in figures}) == len(figures)
