"""Shapes of papers: derived counts to the digit where they are known, published ones to their last place."""

import pytest

from moekit.plan.papers import paper, paper_names
from moekit.plan.parameters import parameters

# Counts that follow from the published shapes, stored and active.
DERIVED = {
    "deepseekmoe-2b": (1_967_390_720, 315_883_520),
    "deepseekmoe-145b": (144_612_773_888, 22_187_331_584),
    "switch-base": (7_439_843_328, 248_709_120),
    "switch-c": (1_571_375_636_480, 1_794_990_080),
    "glam-64b-64e": (1_161_738_321_920, 96_586_432_512),
    "grok-1": (315_684_820_992, 83_756_587_008),
}


def value(name: str, key: str) -> int:
    return parameters(paper(name)).value(key)


@pytest.mark.parametrize("name", DERIVED)
def test_a_papers_shape_counts_to_the_digit(name: str) -> None:
    assert (value(name, "stored.total"), value(name, "active.all")) == DERIVED[name]


# arXiv 2401.06066, tables 1, 2 and 6: experts of the 2B model; 137B and 145B in all. Billions.
@pytest.mark.parametrize(
    ("name", "keys", "published"),
    [
        ("deepseekmoe-2b", ("stored.routed", "stored.shared"), 1.89),
        ("deepseekmoe-2b", ("active_by_part.routed", "active_by_part.shared"), 0.24),
        ("deepseekmoe-145b", ("stored.total",), 144.6),
        ("deepseekmoe-145b", ("active.all",), 22.2),
        ("gshard-137b", ("active.all",), 21.6),
        # arXiv 2101.03961, table 9; of Switch-XXL, 128 experts give the published size.
        ("switch-xxl", ("stored.total",), 394.7),
        ("switch-c", ("stored.total",), 1571.4),
        # arXiv 2112.06905, table 4.
        ("glam-64b-64e", ("active.all",), 96.6),
        ("glam-8b-64e", ("stored.total",), 142.9),
        ("glam-8b-64e", ("active.all",), 9.798),
        ("glam-1.7b-64e", ("active.all",), 1.879),
        ("glam-0.1b-64e", ("stored.total",), 1.9),
        # arXiv 2006.16668, table 1: these shapes' experts.
        ("gshard-600b", ("stored.routed",), 618.5),
        ("gshard-200b", ("stored.routed",), 206.2),
        ("gshard-150b", ("stored.routed",), 154.6),
        ("gshard-50b", ("stored.routed",), 51.5),
        ("gshard-37b", ("stored.routed",), 38.7),
        ("gshard-12.5b", ("stored.routed",), 12.9),
    ],
)
def test_a_papers_shape_agrees_with_its_figure(name: str, keys: tuple[str, ...], published: float) -> None:
    places = len(str(published).split(".")[1])
    assert round(sum(value(name, key) for key in keys) / 1e9, places) == published


# arXiv 2106.05974: parameters of the V-MoE models, in millions.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("v-moe-s32", 296.9),
        ("v-moe-b16", 979.0),
        ("v-moe-b32", 980.6),
        ("v-moe-l16", 3446.0),
        ("v-moe-h14", 7160.8),
        ("v-moe-h14-last5", 2688.6),
        ("v-moe-15b", 14705.1),
    ],
)
def test_a_vision_model_has_its_published_size(name: str, published: float) -> None:
    assert round(value(name, "stored.total") / 1e6, 1) == published


def test_experts_and_towers_of_the_multi_gate_mixture_hold_what_was_published() -> None:
    assert value("mmoe-synthetic", "stored.routed") + value("mmoe-synthetic", "stored.dense") == 13_056


def test_all_experts_of_the_multi_gate_mixture_run() -> None:
    figures = parameters(paper("mmoe-synthetic"))
    assert figures.value("active.all") == figures.value("stored.total")
    assert figures.value("combinations") == 1


def test_one_feed_forward_less_in_the_first_layer_gives_the_other_count_of_gshard_137b() -> None:
    whole = value("gshard-137b", "stored.total")
    assert whole - 8 * 4096**2 == 136_130_330_624
    assert value("gshard-137b", "active.all") == 21_642_608_640
    assert any("136,130,330,624" in note for note in paper("gshard-137b").notes)


@pytest.mark.parametrize("name", paper_names())
def test_every_paper_says_what_was_published(name: str) -> None:
    blueprint = paper(name)
    assert blueprint.name == name
    assert blueprint.notes[0].startswith("published: ")


@pytest.mark.parametrize("name", paper_names())
def test_mixtures_agree_with_the_weights_of_their_experts(name: str) -> None:
    blueprint = paper(name)
    routed = sum(weight.stored for weight in blueprint.weights if weight.part == "routed")
    assert routed == sum(mixture.layers * mixture.n_routed * mixture.expert for mixture in blueprint.mixtures)
    used = sum(weight.active for weight in blueprint.weights if weight.part == "routed")
    assert used == sum(mixture.layers * mixture.top_k * mixture.expert for mixture in blueprint.mixtures)


def test_an_encoder_keeps_no_cache_and_sees_both_ways() -> None:
    encoder, own, across = paper("switch-base").attentions
    assert (encoder.cached, encoder.causal) == (0, False)
    assert (own.cached, own.causal) == (2 * 768, True)
    assert (across.cached, across.causal) == (2 * 768, False)
