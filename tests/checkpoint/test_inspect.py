"""What a folder holds is told from its headers, and each thing that is wrong with it by its kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import gqa, moe, random_model, shaped, shapes, small
from hypothesis import given
from safetensors.torch import load_file, save_file

from moekit.checkpoint.convert import convert
from moekit.checkpoint.folder import INDEX, WEIGHTS
from moekit.checkpoint.inspect import Inspection, inspect
from moekit.checkpoint.load import load
from moekit.checkpoint.parts import parts
from moekit.checkpoint.save import save_model
from moekit.config.errors import InputError
from moekit.config.model import GQAConfig, ModelConfig, RopeConfig
from moekit.config.moe import MoEConfig
from moekit.data.tokenizer import save_tokenizer, train_tokenizer
from moekit.model.transformer import Transformer

NORM = "model.norm.weight"


def write(config: ModelConfig, folder: Path, shard_bytes: int = 10**9) -> Path:
    model = random_model(config)
    save_model(model.state_dict(), config, folder, None, shard_bytes)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(small(mtp_depth=1), tmp_path_factory.mktemp("single") / "model")


@pytest.fixture(scope="module")
def whole_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(small(), tmp_path_factory.mktemp("shards") / "model", 4000)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def shards(whole_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_shards, tmp_path / "model"))


def kinds(found: Inspection) -> list[str]:
    return [problem.kind for problem in found.problems]


@given(shapes)
def test_the_parts_add_up_to_the_size_of_the_model(shape: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = Transformer(shaped(shape))
    found = parts(model)
    stored, active = model.size()
    assert sum(count.total for count in found.values()) == stored
    assert sum(count.active for count in found.values()) == active
    assert ("head" in found) != shape["tied"]
    assert ("prediction module" in found) == bool(shape["mtp"])


def test_each_part_holds_what_its_name_says() -> None:
    config = small(mtp_depth=1)
    model = random_model(config)
    found = parts(model)
    layers = [layer for layer in model.layers if hasattr(layer.feed_forward, "experts")]
    assert model.mtp is not None
    expected = {
        "embedding": [model.embedding],
        "head": [model.head],
        "prediction module": [model.mtp],
        "routed experts": [layer.feed_forward.experts for layer in layers],
        "shared experts": [layer.feed_forward.shared for layer in layers],
        "router": [module for layer in layers for module in (layer.feed_forward.router, layer.feed_forward.balance)],
        "dense feed-forward": [layer.feed_forward for layer in model.layers if layer not in layers],
    }
    for part, modules in expected.items():
        assert found[part].total == sum(p.numel() for module in modules for p in module.parameters()), part
    assert found["routed experts"].active * 8 == found["routed experts"].total * 3


@pytest.mark.parametrize(
    "config", [small(mtp_depth=1), small(tie_embeddings=True), gqa(), small(dense_layers=(0, 1, 2))]
)
def test_a_whole_folder_has_no_problem_and_every_byte_is_counted(config: ModelConfig, tmp_path: Path) -> None:
    found = inspect(write(config, tmp_path / "model", 4000))
    assert not found.problems
    assert found.values.state == "finite"
    assert found.config == config
    headers = 0
    for shard in found.shards:
        with (tmp_path / "model" / shard.file).open("rb") as opened:
            headers += 8 + int.from_bytes(opened.read(8), "little")
    assert sum(space.bytes for space in found.dtypes.values()) + headers == sum(shard.bytes for shard in found.shards)
    assert sum(space.tensors for space in found.dtypes.values()) == sum(shard.tensors for shard in found.shards)


def test_scales_of_fp8_blocks_are_counted_as_scales(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "fp8", "fp8")
    found = inspect(tmp_path / "fp8")
    assert not found.problems
    assert found.dtypes["F32 scales"].tensors == found.dtypes["F8_E4M3"].tensors > 0
    assert found.dtypes["F32"].tensors == 3, "the selection biases of three layers"


Change = Callable[[dict[str, torch.Tensor]], object]

SCALED = "model.layers.0.mlp.down_proj.weight"


def change(folder: Path, what: Change, name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    what(tensors)
    save_file(tensors, folder / name)


WEIGHTS_WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(NORM), NORM),
    "unexpected": (lambda t: t.update(stray=torch.ones(1)), "stray"),
    "wrong shape": (lambda t: t.update({NORM: torch.ones(5)}), NORM),
    "wrong type": (lambda t: t.update({NORM: torch.ones(12).long()}), NORM),
    "not finite": (lambda t: t[NORM][3:4].fill_(torch.nan), NORM),
}


@pytest.mark.parametrize(("kind", "what", "name"), [(k, *v) for k, v in WEIGHTS_WRONG.items()], ids=WEIGHTS_WRONG)
def test_what_is_wrong_with_a_tensor_is_named(kind: str, what: Change, name: str, folder: Path) -> None:
    change(folder, what)
    found = inspect(folder)
    assert kinds(found) == [kind]
    assert name in found.problems[0].text
    assert found.parts is not None


def test_quantised_weights_without_scales_or_description_are_named(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "fp8", "fp8")
    change(tmp_path / "fp8", lambda t: t.pop(f"{SCALED}_scale_inv"))
    assert kinds(inspect(tmp_path / "fp8")) == ["missing"]
    data = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del data["quantization_config"]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(data))
    assert set(kinds(inspect(tmp_path / "fp8"))) == {"wrong type", "unexpected"}


def test_a_bias_that_nothing_would_use_is_named(tmp_path: Path) -> None:
    folder = write(small(moe=moe(biased=False)), tmp_path / "model")
    assert not inspect(folder).problems
    change(folder, lambda t: t["model.layers.1.mlp.gate.e_score_correction_bias"].fill_(0.5))
    assert kinds(inspect(folder)) == ["not zero"]


def test_several_problems_are_all_listed(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.5.down_proj.weight"][0, 0] = torch.inf
        tensors["lm_head.weight"][0, 0] = -torch.inf
        del tensors[NORM]

    change(folder, spoil)
    found = inspect(folder)
    assert sorted(kinds(found)) == ["missing", "not finite", "not finite"]
    assert found.values.state == "not finite"


def test_what_is_there_is_not_unexpected_because_other_tensors_are_missing(folder: Path) -> None:
    experts = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(8)]
    change(folder, lambda t: [t.pop(name) for name in experts])
    found = inspect(folder)
    assert kinds(found) == ["missing"] * 8
    assert all(name in problem.text for name, problem in zip(experts, found.problems, strict=True))


def test_a_damaged_number_of_experts_ends_in_problems_and_in_time(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"n_routed_experts": 1 << 30}))
    found = set(kinds(inspect(folder)))
    assert "missing" in found and "unexpected" not in found


def test_shards_that_are_missing_damaged_or_disagree_are_named(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    content = (shards / first).read_bytes()

    (shards / first).unlink()
    found = inspect(shards)
    assert kinds(found) == ["missing shard"]
    assert first in found.problems[0].text
    assert found.parts is not None, "the configuration still says what the model is"

    (shards / first).write_bytes(content[:-1])
    assert kinds(inspect(shards)) == ["damaged file"]
    (shards / first).write_bytes(content)

    name = next(name for name, file in index["weight_map"].items() if file == first)
    extra = load_file(shards / second) | {name: load_file(shards / first)[name]}
    kept = (shards / second).read_bytes()
    save_file(extra, shards / second)
    assert kinds(inspect(shards)) == ["duplicated"]
    (shards / second).write_bytes(kept)

    del index["weight_map"][name]
    (shards / INDEX).write_text(json.dumps(index))
    assert kinds(inspect(shards)) == ["not indexed"]
    index["weight_map"][name] = second
    (shards / INDEX).write_text(json.dumps(index))
    assert kinds(inspect(shards)) == ["missing"]


def test_a_tokenizer_must_be_readable_and_fit_the_embeddings(tmp_path: Path) -> None:
    folder = write(small(vocab_size=400), tmp_path / "model")
    assert inspect(folder).token_ids is None
    save_tokenizer(train_tokenizer(["a b c " * 9], 300), folder)
    fitting = inspect(folder)
    assert not fitting.problems
    assert fitting.token_ids is not None and 258 <= fitting.token_ids <= 300
    (folder / "tokenizer.json").write_text("{}")
    assert kinds(inspect(folder)) == ["tokenizer"]

    smaller = write(small(vocab_size=23), tmp_path / "smaller")
    save_tokenizer(train_tokenizer(["a b c " * 9], 300), smaller)
    found = inspect(smaller)
    assert kinds(found) == ["tokenizer"]
    assert "has 2" in found.problems[0].text and "23 embeddings" in found.problems[0].text


def test_copies_and_derived_tensors_are_no_problem(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    found = inspect(folder)
    assert not found.problems
    assert found.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert set(found.copies) == {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}


def test_values_are_read_when_asked_and_left_when_not(folder: Path) -> None:
    change(folder, lambda t: t[NORM].fill_(torch.nan))
    assert inspect(folder, read_values=False).values.state == "not read"
    assert not inspect(folder, read_values=False).problems
    assert inspect(folder, read_values=True).values.state == "not finite"


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json in it"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        inspect(tmp_path)


def test_a_gate_without_effect_may_hold_anything_here_as_in_loading(tmp_path: Path) -> None:
    """Qwen2-MoE without a shared expert still stores the gate of one."""
    attention = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qkv_bias=True)
    mixture = MoEConfig(expert_width=8, n_routed=8, n_shared=0, top_k=3)
    config = small(attention=attention, rope=RopeConfig(layout="half"), moe=mixture)
    save_model(random_model(config).state_dict(), config, tmp_path / "model", None, model_type="qwen2_moe")
    file = tmp_path / "model" / WEIGHTS
    tensors = load_file(file)
    tensors["model.layers.1.mlp.shared_expert_gate.weight"].fill_(0.5)
    save_file(tensors, file)
    assert load(tmp_path / "model").state_dict()
    assert inspect(tmp_path / "model").problems == ()
