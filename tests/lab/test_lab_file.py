"""A lab file resolves every variant before anything runs, and refuses what could not be compared."""

from dataclasses import replace
from pathlib import Path

import pytest
from lab_cases import LAB, write_lab

from moekit.config.errors import InputError
from moekit.config.lab import differences, read_lab
from moekit.config.presets.load import load_run
from moekit.lab.places import check_unchanged, places

ROOT = Path(__file__).parents[2]


def test_a_variant_is_the_base_changed_by_the_settings_and_then_by_itself(tmp_path: Path) -> None:
    lab = read_lab(write_lab(tmp_path))
    plain, choice = (variant.config for variant in lab.variants)
    base = load_run(str(tmp_path / "base.toml"))
    assert plain == replace(base, optim=replace(base.optim, lr=0.01))
    assert (choice.model.moe.top_k, choice.optim.lr, choice.train) == (3, 0.01, base.train)
    assert [variant.about for variant in lab.variants] == ["nothing that balances", ""]
    assert lab.variants[1].sets == {
        "model.moe.routing.score": "sigmoid",
        "model.moe.routing.renormalise": "true",
        "model.moe.top_k": "3",
    }


def test_every_variant_runs_with_every_seed_and_all_with_the_first_before_the_next(tmp_path: Path) -> None:
    found = places(read_lab(write_lab(tmp_path)), Path("out"))
    assert [(place.variant.name, place.config.seed) for place in found] == [
        ("plain", 3),
        ("choice", 3),
        ("plain", 4),
        ("choice", 4),
    ]
    assert found[3].folder == Path("out/runs/choice/seed-4")
    check_unchanged(found)


def test_differences_are_the_keys_in_which_variants_disagree(tmp_path: Path) -> None:
    assert differences(read_lab(write_lab(tmp_path))) == {
        "plain": {
            "model.moe.routing.renormalise": "false",
            "model.moe.routing.score": "softmax",
            "model.moe.top_k": "2",
        },
        "choice": {
            "model.moe.routing.renormalise": "true",
            "model.moe.routing.score": "sigmoid",
            "model.moe.top_k": "3",
        },
    }


WRONG = {
    "model.moe.top_k = 3": ("model.moe.top_k = 99", "`variants.choice.model.moe.top_k`: 99 experts per token"),
    "model.moe.top_k = 3 #": ("model.moe.topk = 3", "`variants.choice.model.moe.topk`: unknown key"),
    "lr = 0.01": ("lr = -1", "`settings.optim.lr`: -1.0 must be above 0"),
    "seeds = [3, 4]": ("seeds = [3, 3]", "`seeds`: [3, 3] holds one twice"),
    "seeds = [3, 4] #": ("seeds = []", "`seeds`: [] is not a list of whole numbers"),
    "seeds = [3, 4] ##": ("seeds = [-1]", "`seeds`: [-1] is not a list"),
    "title": ("tilte", "`tilte`: unknown key"),
    'base = "base.toml"': ('base = "nowhere"', "nowhere"),
    'base = "base.toml" #': ("", "`base`: name a preset"),
    "about =": ("seed =", "`variants.plain.seed`: a variant has no seed of its own"),
    'about = "nothing that balances"': ("about = 1", "`variants.plain.about`: 1 is not text"),
    "[variants.plain]": ('[variants."../plain"]', "'../plain' cannot be the name of a folder"),
    "[settings.optim]": ("settings = 1\n[other]", "`other`: unknown key"),
}


@pytest.mark.parametrize("old", WRONG)
def test_what_is_wrong_is_named_by_file_and_key(old: str, tmp_path: Path) -> None:
    new, message = WRONG[old]
    text = LAB.replace(old.rstrip(" #"), new, 1)
    assert text != LAB
    with pytest.raises(InputError) as raised:
        read_lab(write_lab(tmp_path, text))
    assert message in str(raised.value) and str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["base = 'tiny'", "base = 'tiny'\nvariants = 1", "base = 'tiny'\nvariants.a = 1"])
def test_a_lab_needs_variants(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="variants"):
        read_lab(write_lab(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.steps = 9", "train.steps"),
        ("train.batch = 2", "train.batch"),
        ("model.vocab_size = 400", "model.vocab_size"),
        ("data.sequence_length = 8", "data.sequence_length"),
        ("data.sources = [{ path = 'words.txt' }]", "data.sources.0.path"),
    ],
)
def test_variants_that_would_not_read_the_same_text_in_the_same_order_are_refused(
    change: str, key: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"variants.choice.{key}.*in variant plain"):
        read_lab(write_lab(tmp_path, LAB + change))


def test_a_micro_batch_may_differ(tmp_path: Path) -> None:
    read_lab(write_lab(tmp_path, LAB + "train.micro_batch = 2"))


def test_the_lab_on_balance_gives_all_variants_equal_expert_parameters() -> None:
    lab = read_lab(ROOT / "labs" / "balance.toml")
    layers = [variant.config.model.moe for variant in lab.variants]
    assert len(layers) == 9 and len(lab.seeds) == 3
    assert len({moe.n_routed * moe.expert_width for moe in layers}) == 1
    assert len({moe.top_k * moe.expert_width for moe in layers}) == 1
    assert len({moe.shared_width for moe in layers}) == 1
    assert all(moe.routing.causal for moe in layers)
