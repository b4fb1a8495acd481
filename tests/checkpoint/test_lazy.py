"""A loaded model reads what is used, when it is used, and is an ordinary model in all else."""

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import gqa, moe, random_ids, random_model, small
from safetensors.torch import load_file, save_file

from moekit.checkpoint import weights
from moekit.checkpoint.load import load
from moekit.checkpoint.save import save, save_model
from moekit.config.model import ModelConfig
from moekit.model.transformer import Transformer

EXPERTS = "feed_forward.experts."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(small(mtp_depth=1), tmp_path)


def saved(config: ModelConfig, path: Path) -> Path:
    model = random_model(config)
    save_model(model.state_dict(), config, path / "model", None)
    return path / "model"


def unread(model: Transformer) -> set[str]:
    """Parameters that are still on disk."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name, parameter in dict.items(module._parameters)
        if parameter is not None and parameter.is_meta
    }


def test_nothing_is_read_until_it_is_used(folder: Path) -> None:
    model = load(folder)
    assert len(unread(model)) == len(random_model(model.config).state_dict())
    assert model.layers[1].attention.out.weight.shape == (12, 10)
    assert "layers.1.attention.out.weight" not in unread(model)
    assert "layers.1.attention.kv_b.weight" in unread(model)


def test_without_gradients_an_expert_is_read_when_a_token_comes_to_it(folder: Path) -> None:
    model = load(folder)
    with torch.inference_mode():
        routing = model(torch.tensor([[3]])).routings[0]
    layer = model.moe_layers()[0]
    assert set(layer.experts.stored.known) == set(routing.experts.flatten().tolist())
    left = {name for name in unread(model) if not name.startswith("mtp.")}
    assert left == {f"layers.{i}.{EXPERTS}{part}" for i in (1, 2) for part in ("gate_up", "down")}


@torch.no_grad()
def test_a_layer_on_its_own_reads_no_more_than_chosen_experts_each_time(folder: Path) -> None:
    layer = load(folder, "bfloat16").moe_layers()[0]
    x = torch.randn(6, 1, layer.config.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    used: set[int] = set()
    for token in x:
        used |= set(layer(token).routing.experts.flatten().tolist())
        assert layer.experts.stored is not None
        assert set(layer.experts.stored.known) == used
        assert {name for name, each in dict.items(layer.experts._parameters) if each.is_meta} == {"gate_up", "down"}
    expected = copy.deepcopy(layer)
    assert expected.experts.stored is None
    for token in x:
        torch.testing.assert_close(layer(token).y, expected(token).y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [small(), gqa(), small(moe=moe(shared=0), tie_embeddings=True)])
def test_experts_from_disk_and_stacked_experts_give_the_same(config: ModelConfig, dtype: str, tmp_path: Path) -> None:
    path = saved(config, tmp_path)
    stacked = load(path, dtype)
    stacked.state_dict()
    assert not unread(stacked)
    with torch.inference_mode():
        found, expected = load(path, dtype)(random_ids()).logits, stacked(random_ids()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if dtype == "float32" else 0.05)


def test_a_model_that_has_run_without_gradients_can_be_trained(folder: Path) -> None:
    model, twin = load(folder), random_model(load(folder).config)
    with torch.inference_mode():
        model(random_ids())
    for each in (model, twin):
        each(random_ids()).logits.square().mean().backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_changed_experts_are_the_ones_that_run(folder: Path) -> None:
    model = load(folder)
    with torch.inference_mode():
        before = model(random_ids()).logits.clone()
    with torch.no_grad():
        for layer in model.moe_layers():
            layer.experts.down.zero_()
        assert not torch.allclose(model(random_ids()).logits, before)


def test_writing_to_weights_leaves_the_file_alone(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert (folder / "model.safetensors").read_bytes() == content
    assert torch.equal(load(folder).norm.weight, random_model(model.config).norm.weight)


def test_a_folder_may_go_while_its_model_is_in_use(folder: Path) -> None:
    expected = load(folder).state_dict()
    model = load(folder)
    shutil.rmtree(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


OPERATIONS: dict[str, Any] = {
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "float": lambda model: model.float(),
    "bfloat16-and-back": lambda model: model.bfloat16().float(),
    "train": lambda model: model.train().eval(),
    "apply": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("change", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_it_behaves_as_any_model(change: Any, tmp_path: Path) -> None:
    config = small(mtp_depth=1, tie_embeddings=True)
    path = saved(config, tmp_path)
    found, expected = change(load(path)), change(random_model(config))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.head.weight is found.embedding.weight
    assert found.size() == expected.size()


def test_the_size_of_a_model_is_known_before_it_is_read(folder: Path) -> None:
    model = load(folder)
    n_unread = len(unread(model))
    assert model.size() == random_model(model.config).size()
    assert len(unread(model)) == n_unread


def test_what_moekit_writes_is_mapped_as_whole_stacks(folder: Path) -> None:
    """Gate and up of all experts of a layer follow each other in the file, so that no copy is needed."""
    model = load(folder)
    stack = model.moe_layers()[0].experts.gate_up
    begin, end = stack.data_ptr(), stack.data_ptr() + stack.nbytes
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        [int(number, 16) for number in line[0].split("-")] for line in maps if line[-1].endswith("model.safetensors")
    ]
    assert any(low <= begin and end <= high for low, high in spans)


def test_another_order_of_tensors_in_the_file_makes_no_difference(folder: Path) -> None:
    expected = load(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors")
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("window", [1, 64, 5000, 10**6])
def test_a_file_larger_than_memory_is_mapped_in_windows(
    window: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(folder).state_dict()
    monkeypatch.setattr(weights, "WINDOW", window)
    for name, tensor in load(folder).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shard_bytes", [1, 700, 5000, 10**9])
def test_shards_hold_what_one_file_holds(shard_bytes: int, tmp_path: Path) -> None:
    model = random_model(small(mtp_depth=1))
    save(model, tmp_path / "sharded", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    largest = max(tensor.nbytes for file in files for tensor in load_file(file).values())
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= max(shard_bytes, largest)
    assert len(files) == 1 or (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    found = load(tmp_path / "sharded").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
