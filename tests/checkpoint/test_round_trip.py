"""What is saved is loaded, bit for bit."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import V2, gqa, moe, random_ids, random_model, shaped, shapes, small
from hypothesis import given, settings
from safetensors.torch import load_file

from moekit.checkpoint.load import load, load_config, stop_ids
from moekit.checkpoint.save import save, save_model
from moekit.checkpoint.storage import new_folder
from moekit.config.errors import InputError
from moekit.config.families import family_for, meaning
from moekit.config.model import GQAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.config.moe import MoEConfig
from moekit.model.transformer import Transformer

OWN = {
    "gqa": gqa(),
    "gqa-tied-mtp": gqa(tie_embeddings=True, mtp_depth=1),
    "v2-renormalised": small(moe=replace(V2, routing=replace(V2.routing, renormalise=True))),
    "dense-layer-in-the-middle": small(dense_layers=(1,)),
    "shared-gate": small(moe=replace(moe(), shared_gate=True)),
    "epsilon": small(moe=replace(moe(), routing=replace(moe().routing, epsilon=0.0))),
    "one-expert-per-group": small(
        moe=replace(moe(), routing=replace(moe(1).routing, n_groups=8, top_k_groups=8, group_score="max"))
    ),
    "half-a-temperature": small(rope=RopeConfig(scaling=YarnConfig(mscale=0.7, mscale_all_dim=0.0))),
}
"""Models that no family of the hub expresses."""


def saved(model: Transformer, folder: Path) -> Path:
    save_model(model.state_dict(), model.config, folder, None)
    return folder


def assert_same(found: Transformer, expected: Transformer) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@settings(max_examples=40)
@given(shapes)
def test_every_tensor_of_a_deepseek_v3_comes_back(shape: dict[str, Any]) -> None:
    model = random_model(shaped(shape))
    with tempfile.TemporaryDirectory() as folder:
        path = saved(model, Path(folder) / "model")
        assert json.loads((path / "config.json").read_text())["model_type"] == "deepseek_v3"
        found = load(path)
    assert meaning(found.config) == meaning(model.config)
    assert_same(found, model)
    # Sums may be taken in another order: the mapped weights lie elsewhere in their cache lines.
    torch.testing.assert_close(found(random_ids()).logits, model(random_ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", OWN.values(), ids=OWN.keys())
def test_what_no_family_expresses_is_saved_as_our_own(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    path = saved(model, tmp_path / "model")
    assert json.loads((path / "config.json").read_text())["model_type"] == "moekit"
    found = load(path)
    assert found.config == config
    assert_same(found, model)


def test_a_field_without_effect_does_not_change_the_family() -> None:
    config = small()
    for routing in (
        replace(moe(1).routing, group_score="max"),
        replace(moe().routing, renormalise=False, epsilon=0.0),
        replace(moe().routing, top_k_groups=4, group_score="max"),
    ):
        assert family_for(replace(config, moe=replace(config.moe, routing=routing))).model_type == "deepseek_v3"
    assert family_for(replace(config, moe=config.moe_block)).model_type == "deepseek_v3"
    assert family_for(replace(config, moe=replace(config.moe, routing=moe(2).routing))).model_type == "deepseek_v3"


def test_a_selection_bias_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    model = random_model(small(mtp_depth=1))
    path = saved(model, tmp_path / "model")
    found = load(path, dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        wanted = tensor if name.endswith("selection_bias") else tensor.bfloat16()
        assert found.state_dict()[name].dtype == wanted.dtype
        assert torch.equal(found.state_dict()[name], wanted)
    assert_same(load(saved(found, tmp_path / "rounded")), found)


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    path = saved(random_model(small(tie_embeddings=True)), tmp_path / "model")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    found = load(path)
    assert found.head.weight is found.embedding.weight


def test_others_may_read_the_weights_who_may_read_the_configuration(tmp_path: Path) -> None:
    path = saved(random_model(small()), tmp_path / "model")
    modes = {(path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    model = random_model(small())
    with pytest.raises(KeyError):
        save_model(
            dict(model.state_dict()) | {"stray": torch.ones(1)},
            model.config,
            tmp_path / "a",
            None,
        )
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "b") as building:
        (building / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_saved_over(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        saved(random_model(small()), tmp_path)
    assert (tmp_path / "mine").read_text() == "x"


def test_the_leftover_of_a_killed_save_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".model.writing").mkdir()
    (tmp_path / ".model.writing" / "half").write_text("x")
    model = random_model(small())
    path = saved(model, tmp_path / "model")
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "model.safetensors"]
    assert load_config(path) == model.config
    assert stop_ids(path) == ()


def test_a_model_is_saved_as_the_family_it_was_loaded_as(tmp_path: Path) -> None:
    """A mixture whose layers are all dense is also a dense model."""
    head = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm="head")
    dense = small(attention=head, rope=RopeConfig(layout="half"), dense_layers=(0, 1, 2), moe=MoEConfig())
    model = random_model(dense)
    for name in ("qwen3", "qwen3_moe"):
        save_model(model.state_dict(), dense, tmp_path / name, None, model_type=name)
        save(load(tmp_path / name), tmp_path / f"{name}-again")
        for folder in (tmp_path / name, tmp_path / f"{name}-again"):
            assert json.loads((folder / "config.json").read_text())["model_type"] == name
