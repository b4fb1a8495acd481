"""Overrides from the command line: together, in any order."""

from itertools import permutations

import pytest

from moekit.config.balance import BiasBalance, ExpertLoss, SequenceLoss
from moekit.config.codec import overrides, to_dict, update
from moekit.config.model import GQAConfig, MLAConfig, YarnConfig
from moekit.config.run import RunConfig, Source

TOGETHER = [("model.moe.top-k", "40"), ("model.moe.n-routed", "64"), ("model.moe.routing.n-groups", "8")]
TOGETHER += [("model.moe.routing.top-k-groups", "5")]


def apply(*pairs: tuple[str, str], base: RunConfig | None = None) -> RunConfig:
    return update(base or RunConfig(), overrides(list(pairs)))


@pytest.mark.parametrize("pairs", list(permutations(TOGETHER)))
def test_overrides_are_validated_together_whatever_their_order(pairs: tuple[tuple[str, str], ...]) -> None:
    moe = apply(*pairs).model.moe
    assert (moe.top_k, moe.n_routed, moe.routing.n_groups, moe.routing.top_k_groups) == (40, 64, 8, 5)


def test_dashes_and_underscores_name_the_same_key() -> None:
    assert apply(("model.moe.n-routed", "32")) == apply(("model.moe.n_routed", "32"))


def test_an_override_leaves_its_neighbours_alone() -> None:
    changed, default = to_dict(apply(("model.moe.top_k", "2"))), to_dict(RunConfig())
    assert changed["model"]["moe"].pop("top_k") == 2
    assert default["model"]["moe"].pop("top_k") == 4
    assert changed == default


def test_the_kind_of_a_section_chooses_its_class_and_fresh_defaults() -> None:
    heads = apply(("model.attention.kind", "gqa"), ("model.attention.n_kv_heads", "2")).model.attention
    assert heads == GQAConfig(n_kv_heads=2)


def test_without_kind_a_section_keeps_its_class() -> None:
    assert apply(("model.attention.n_heads", "8")).model.attention == MLAConfig(n_heads=8)


def test_the_optimizer_is_chosen_by_its_kind() -> None:
    assert apply(("optim.kind", "adamw")).optim.kind == "adamw"


def test_a_table_keyed_by_kind_adds_a_rule_and_keeps_the_others() -> None:
    base = apply(("model.moe.balance.bias.rate", "0.01"))
    more = apply(("model.moe.balance.sequence_loss.coefficient", "0.5"), base=base)
    assert more.model.moe.balance == (BiasBalance(rate=0.01), SequenceLoss(coefficient=0.5))


def test_a_table_keyed_by_kind_changes_a_rule_that_is_there() -> None:
    base = apply(("model.moe.balance.expert_loss.coefficient", "0.5"))
    more = apply(("model.moe.balance.expert_loss.scope", "batch"), base=base)
    assert more.model.moe.balance == (ExpertLoss(coefficient=0.5, scope="batch"),)


def test_none_removes_one_rule() -> None:
    base = apply(("model.moe.balance.bias.rate", "0.01"), ("model.moe.balance.z_loss.coefficient", "0.1"))
    assert apply(("model.moe.balance.z_loss", "none"), base=base).model.moe.balance == (BiasBalance(rate=0.01),)


def test_none_removes_all_rules() -> None:
    base = apply(("model.moe.balance.bias.rate", "0.01"))
    assert apply(("model.moe.balance", "none"), base=base).model.moe.balance == ()


@pytest.mark.parametrize("start", [(), (("model.moe.balance.z_loss.coefficient", "0.1"),)])
def test_none_empties_a_table_before_it_is_filled(start: tuple[tuple[str, str], ...]) -> None:
    filled = apply(("model.moe.balance", "none"), ("model.moe.balance.bias.rate", "0.01"), base=apply(*start))
    assert filled.model.moe.balance == (BiasBalance(rate=0.01),)


def test_none_resets_one_rule_before_it_is_filled() -> None:
    base = apply(("model.moe.balance.expert_loss.scope", "batch"))
    key = "model.moe.balance.expert_loss"
    assert apply((key, "none"), (f"{key}.coefficient", "0.5"), base=base).model.moe.balance == (
        ExpertLoss(coefficient=0.5),
    )


def test_none_clears_an_optional_value_and_an_optional_section() -> None:
    base = apply(("model.attention.q_lora_rank", "8"), ("model.rope.scaling.factor", "8"))
    assert base.model.rope.scaling == YarnConfig(factor=8.0)
    cleared = apply(("model.attention.q_lora_rank", "none"), ("model.rope.scaling", "none"), base=base)
    assert cleared == RunConfig()


def test_none_resets_an_optional_section_before_it_is_filled() -> None:
    base = apply(("model.rope.scaling.mscale", "0.5"))
    filled = apply(("model.rope.scaling", "none"), ("model.rope.scaling.factor", "8"), base=base)
    assert filled.model.rope.scaling == YarnConfig(factor=8.0)


def test_a_list_is_reached_by_position() -> None:
    base = apply(("data.sources", '[{path = "a.txt"}, {path = "b.txt"}]'))
    changed = apply(("data.sources.1.weight", "3"), base=base)
    assert changed.data.sources == (Source(path="a.txt"), Source(path="b.txt", weight=3.0))


def test_a_list_grows_by_one_position() -> None:
    assert apply(("data.sources.0.path", "a.txt")).data.sources == (Source(path="a.txt"),)


def test_none_empties_a_list_before_it_is_filled() -> None:
    base = apply(("data.sources.0.path", "a.txt"), ("data.sources.1.path", "b.txt"))
    assert apply(("data.sources", "none"), ("data.sources.0.path", "c"), base=base).data.sources == (Source(path="c"),)


def test_text_that_looks_like_a_number_stays_text_where_text_is_wanted() -> None:
    assert apply(("data.tokenizer", "1")).data.tokenizer == "1"
