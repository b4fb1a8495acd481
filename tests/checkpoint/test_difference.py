"""Two folders are compared by what they mean: in our names, whatever their layouts, types and shards are."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoint_cases import gqa, random_model, small
from safetensors.torch import load_file, save_file

from moekit.checkpoint.convert import convert
from moekit.checkpoint.difference import TensorDifference, compare
from moekit.checkpoint.load import load
from moekit.checkpoint.save import save, save_model
from moekit.config.balance import BiasBalance
from moekit.config.errors import InputError
from moekit.config.families import family_named
from moekit.config.model import ModelConfig

NORM = "model.norm.weight"


def write(config: ModelConfig, folder: Path, seed: int = 0, shard_bytes: int = 10**9) -> Path:
    save_model(random_model(config, seed).state_dict(), config, folder, None, shard_bytes)
    return folder


def states(a: Path, b: Path) -> set[str]:
    return {tensor.state for tensor in compare(a, b).tensors}


@pytest.mark.parametrize("config", [small(mtp_depth=1), gqa(), small(tie_embeddings=True)], ids=["hub", "own", "tied"])
def test_a_folder_is_identical_to_itself_in_other_shards(config: ModelConfig, tmp_path: Path) -> None:
    a, b = write(config, tmp_path / "a"), write(config, tmp_path / "b", shard_bytes=4000)
    found = compare(a, b)
    assert found.identical
    assert {tensor.name for tensor in found.tensors} == random_model(config).state_dict().keys() - (
        {"head.weight"} if config.tie_embeddings else set()
    )


def test_the_order_of_tensors_in_a_file_does_not_matter(tmp_path: Path) -> None:
    """Safetensors' own writer sorts by type and name, so that experts do not stand in the order of their numbers."""
    a, b = write(small(), tmp_path / "a"), write(small(), tmp_path / "b")
    save_file(load_file(b / "model.safetensors"), b / "model.safetensors")
    assert (a / "model.safetensors").read_bytes() != (b / "model.safetensors").read_bytes()
    assert compare(a, b).identical


def test_figures_are_those_of_the_tensors(tmp_path: Path) -> None:
    config = small()
    first, second = random_model(config, 0).state_dict(), random_model(config, 1).state_dict()
    found = compare(write(config, tmp_path / "a", 0), write(config, tmp_path / "b", 1))
    assert not found.identical
    for tensor in found.tensors:
        a, b = first[tensor.name].double(), second[tensor.name].double()
        assert tensor.state == "different"
        assert tensor.dtypes == ("F32", "F32")
        assert tensor.largest == (a - b).abs().max().item()
        assert tensor.mean == pytest.approx((a - b).abs().mean().item(), rel=1e-12)
        assert tensor.relative == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-12)


def test_a_rounded_copy_differs_by_its_rounding(tmp_path: Path) -> None:
    a = write(small(), tmp_path / "a")
    convert(a, tmp_path / "b", "bfloat16")
    for tensor in compare(a, tmp_path / "b").tensors:
        if tensor.name.endswith("selection_bias"):
            assert (tensor.state, tensor.dtypes) == ("identical", ("F32", "F32"))
        else:
            assert (tensor.state, tensor.dtypes) == ("different", ("F32", "BF16"))
            assert tensor.relative is not None and 0 < tensor.relative < 2**-8


def test_another_type_of_the_same_values_is_no_other_value(tmp_path: Path) -> None:
    a = write(small(), tmp_path / "a")
    convert(a, tmp_path / "b", "bfloat16")
    convert(tmp_path / "b", tmp_path / "c", "float32")
    found = compare(tmp_path / "b", tmp_path / "c")
    assert {tensor.state for tensor in found.tensors} == {"same values", "identical"}
    assert not found.identical


def test_fp8_against_its_conversion_is_the_same(tmp_path: Path) -> None:
    a = write(small(), tmp_path / "a")
    convert(a, tmp_path / "fp8", "fp8")
    convert(tmp_path / "fp8", tmp_path / "plain", "bfloat16")
    assert compare(tmp_path / "fp8", tmp_path / "fp8").identical
    assert states(tmp_path / "fp8", tmp_path / "plain") == {"same values", "identical"}
    found = {tensor.name: tensor for tensor in compare(a, tmp_path / "fp8").tensors}
    experts = found["layers.1.feed_forward.experts.gate_up"]
    assert experts.dtypes == ("F32", "F8_E4M3")
    assert experts.relative is not None and 2**-8 < experts.relative < 2**-4


def test_our_own_names_against_the_hubs(tmp_path: Path) -> None:
    """The hub has a tensor for each expert, gate and up apart; ours are stacks of both."""
    config = small(mtp_depth=1)
    hub, own = write(config, tmp_path / "hub"), tmp_path / "own"
    own.mkdir()
    save_file(random_model(config).state_dict(), own / "model.safetensors")
    (own / "config.json").write_text(json.dumps(family_named("moekit", "here").to_hub(config)), "utf-8")
    assert compare(hub, own).identical
    assert compare(own, hub).identical


def test_one_changed_number_of_one_expert_is_found(tmp_path: Path) -> None:
    a, b = write(small(), tmp_path / "a"), write(small(), tmp_path / "b")
    tensors = load_file(b / "model.safetensors")
    tensors["model.layers.2.mlp.experts.7.up_proj.weight"][-1, -1] += 1.0
    save_file(tensors, b / "model.safetensors")
    (changed,) = [tensor for tensor in compare(a, b).tensors if tensor.state != "identical"]
    assert changed.name == "layers.2.feed_forward.experts.gate_up"
    assert changed.largest == pytest.approx(1.0, abs=1e-6)


def test_zeros_of_both_signs_are_the_same_value_and_not_identical(tmp_path: Path) -> None:
    a, b = (write(small(), tmp_path / name) for name in "ab")
    for folder, zero in ((a, 0.0), (b, -0.0)):
        tensors = load_file(folder / "model.safetensors")
        tensors[NORM].fill_(zero)
        save_file(tensors, folder / "model.safetensors")
    (changed,) = [tensor for tensor in compare(a, b).tensors if tensor.state != "identical"]
    assert changed == TensorDifference("norm.weight", "same values", ("F32", "F32"), ((12,), (12,)), 0.0, 0.0, 0.0)


def test_against_zeros_there_is_no_relative_figure(tmp_path: Path) -> None:
    a, b = write(small(), tmp_path / "a"), write(small(), tmp_path / "b")
    tensors = load_file(a / "model.safetensors")
    tensors[NORM].zero_()
    save_file(tensors, a / "model.safetensors")
    (changed,) = [tensor for tensor in compare(a, b).tensors if tensor.state != "identical"]
    assert changed.relative is None
    assert changed.largest is not None and changed.largest > 0


def test_other_shapes_and_tensors_of_one_side_are_named(tmp_path: Path) -> None:
    a = write(small(), tmp_path / "a")
    b = write(small(dense_width=14, mtp_depth=1), tmp_path / "b")
    found = compare(a, b)
    by_state = {state: {t.name for t in found.tensors if t.state == state} for state in ("other shape", "only in B")}
    assert by_state["other shape"] == {"layers.0.feed_forward.gate_up.weight", "layers.0.feed_forward.down.weight"}
    assert by_state["only in B"] and all(name.startswith("mtp.") for name in by_state["only in B"])
    assert {field.field: (field.a, field.b) for field in found.configuration} == {
        "dense_width": ("10", "14"),
        "mtp_depth": ("0", "1"),
    }
    assert {tensor.state for tensor in compare(b, a).tensors} >= {"only in A", "other shape"}


def test_fields_that_change_what_is_computed_are_named_and_others_are_not(tmp_path: Path) -> None:
    config = small()
    trained_otherwise = replace(config, init_std=0.5, moe=replace(config.moe, balance=(BiasBalance(rate=0.5),)))
    fewer = replace(config, moe=replace(config.moe, top_k=2))
    a = write(config, tmp_path / "a")
    assert compare(a, write(trained_otherwise, tmp_path / "b")).identical
    found = compare(a, write(fewer, tmp_path / "c"))
    assert [tuple(field) for field in found.configuration] == [("moe.top_k", "3", "2")]
    assert not found.identical


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    a, b = write(small(), tmp_path / "a"), write(small(), tmp_path / "b")
    tensors = load_file(b / "model.safetensors")
    tensors[NORM][0] = math.nan
    save_file(tensors, b / "model.safetensors")
    with pytest.raises(InputError, match=f"{NORM} holds numbers that are not finite"):
        compare(a, b)


def test_what_was_loaded_and_saved_again_is_identical(tmp_path: Path) -> None:
    a = write(small(mtp_depth=1), tmp_path / "a")
    save(load(a), tmp_path / "b")
    assert compare(a, tmp_path / "b").identical
