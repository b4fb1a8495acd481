"""Shards and their index: each way in which they can disagree is one clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import random_model, small
from safetensors.torch import load_file, save_file

from moekit.checkpoint.load import load
from moekit.checkpoint.save import save
from moekit.config.errors import InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def whole_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    save(random_model(small(mtp_depth=1)), folder, shard_bytes=9000)
    return folder


@pytest.fixture
def folder(whole_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_shards, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / INDEX).read_text())
    replaced = change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(replaced if isinstance(replaced, list) else data))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_whole_shards_load(folder: Path) -> None:
    assert len(shards(folder)) > 2
    assert load(folder).state_dict()


NAME = "model.norm.weight"

OUTSIDE = ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "weights.bin", "a\0.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, 3, None, ["model.safetensors"]])
def test_an_index_may_name_files_of_its_folder_alone(folder: Path, name: object) -> None:
    (folder.parent / "other.safetensors").write_bytes(shards(folder)[0].read_bytes())
    change_index(folder, lambda index: index.update({NAME: name}))
    assert f"{INDEX}: " in refused(folder)


def test_a_file_that_the_index_names_must_be_there(folder: Path) -> None:
    shard = shards(folder)[1]
    shard.unlink()
    assert f"{shard}: no such file, but the index names it" in refused(folder)


def test_a_folder_in_place_of_a_shard_is_no_shard(folder: Path) -> None:
    shard = shards(folder)[1]
    shard.unlink()
    shard.mkdir()
    assert "no such file, but the index names it" in refused(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = shards(folder)[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    assert f"{name} is in {first.name} and in {second}" in refused(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(folder: Path) -> None:
    change_index(folder, lambda index: index.update({NAME: shards(folder)[0].name}))
    assert f"does not hold {NAME}, but the index says so" in refused(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(folder: Path) -> None:
    change_index(folder, lambda index: index.pop(NAME) and None)
    assert f"holds {NAME}, which the index does not name" in refused(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(folder)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "\0"]
)
def test_an_index_of_another_kind_is_named(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    assert INDEX in refused(folder)


def test_links_to_files_elsewhere_are_followed(folder: Path) -> None:
    """The hub's cache holds links into a folder of blobs."""
    shard = shards(folder)[0]
    blob = folder.parent / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    assert load(folder).state_dict()


def test_how_many_things_are_wrong_is_said(folder: Path) -> None:
    change_index(folder, lambda index: [index.pop(name) for name in list(index)[:3]] and None)
    assert "(and 2 more problems)" in refused(folder)
