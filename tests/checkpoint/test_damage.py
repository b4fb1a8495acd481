"""A damaged model folder is one clear error, never a traceback and never a silently wrong model."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import gqa, moe, random_model, small
from safetensors.torch import load_file, save_file

from moekit.checkpoint.load import load, load_config
from moekit.checkpoint.save import save_model
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig

ROUNDS = 100

Change = Callable[[dict[str, Any]], object]


def folder_of(config: ModelConfig, path: Path) -> Path:
    model = random_model(config)
    save_model(model.state_dict(), config, path, None)
    return path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(small(mtp_depth=1), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value != "absent"}), "utf-8")


def change_weights(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"sliding_window": 4096, "attention_sink": 1},
        "`attention_sink`: not understood: attention_sink, sliding_window",
    ),
    "activation": ({"hidden_act": "gelu"}, "`hidden_act`: 'gelu' is not supported"),
    "score": ({"scoring_func": "softmax"}, "`scoring_func`: 'softmax' is not supported"),
    "choice": ({"topk_method": "greedy"}, "`topk_method`: 'greedy' is not supported"),
    "every-other-layer": ({"moe_layer_freq": 0}, "`moe_layer_freq`: 0 must be above 0"),
    "fewer-key-heads": ({"num_key_value_heads": 1}, "`num_key_value_heads`: 1 is not supported"),
    "missing": ({"hidden_size": "absent"}, "`hidden_size`: is missing"),
    "text": ({"hidden_size": "12"}, "`hidden_size`: '12' is not of type int"),
    "infinite": ({"routed_scaling_factor": float("inf")}, "`routed_scaling_factor`: inf is not a finite number"),
    "negative": ({"num_hidden_layers": -1}, "-1 must be above 0"),
    "endless": ({"num_hidden_layers": 10**9}, "wants 1000000000 layers"),
    "too-wide": ({"hidden_size": 2**62}, "describes a model that cannot be"),
    "many-experts": ({"n_routed_experts": 2**30}, "is missing, which config.json wants"),
    "family": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    "list-family": ({"model_type": ["gpt2"]}, "is not supported"),
    "rope-kind": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supported"),
    "rope-text": ({"rope_scaling": "yarn"}, "`rope_scaling`: 'yarn' is not an object"),
    "rope-factor": ({"rope_scaling": {"rope_type": "yarn"}}, "`rope_scaling.factor`: is missing"),
    "rope-unknown": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "short_factor": 3.0}},
        "short_factor`: is not",
    ),
    "rope-partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor`: is not supported"),
    "rope-truncate": ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "truncate`"),
    "rope-temperature": ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 0.7}}, "needs mscale_all_dim"),
    "rope-theta": ({"rope_theta": "many"}, "`rope_theta`: 'many' is not of type float"),
    "own-part": ({"moekit": ["balance"]}, "`moekit`: may hold `balance` alone"),
    "own-rule": ({"moekit": {"balance": {"luck": {}}}}, "`moekit.balance.luck`: unknown key"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_field_that_cannot_be_followed_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert message in refused(folder)


@pytest.mark.parametrize("changes", [{"model": 3}, {"model": {"widht": 3}}, {"quantization_config": {}}])
def test_our_own_description_is_read_as_strictly(changes: dict[str, Any], tmp_path: Path) -> None:
    path = folder_of(gqa(), tmp_path / "own")
    change_config(path, **changes)
    assert next(iter(changes)) in refused(path)


def first_weight(tensors: dict[str, Any], change: Change) -> None:
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])


WEIGHTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing, which config.json wants"),
    "extra": (lambda t: t.update(stray=torch.ones(1)), "holds stray, for which config.json has no use"),
    "shape": (lambda t: first_weight(t, lambda w: w[:5].clone()), r"model.norm.weight is [5], config.json wants [12]"),
    "quantised": (
        lambda t: first_weight(t, lambda w: w.to(torch.float8_e4m3fn)),
        "is of type F8_E4M3, but config.json",
    ),
    "whole-numbers": (lambda t: first_weight(t, lambda w: w.long()), "is of type I64"),
    "half-a-module": (lambda t: t.pop("model.layers.3.eh_proj.weight"), "model.layers.3.eh_proj.weight is missing"),
    "no-module": (lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.3.")], "is missing"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_that_do_not_fit_are_named(folder: Path, change: Change, message: str) -> None:
    change_weights(folder, change)
    assert message in refused(folder)


def test_a_bias_that_nothing_would_use_is_refused(tmp_path: Path) -> None:
    path = folder_of(small(moe=moe(biased=False)), tmp_path / "model")
    change_weights(path, lambda t: t["model.layers.1.mlp.gate.e_score_correction_bias"].fill_(0.5))
    assert "e_score_correction_bias is not zero" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.experts.5.down_proj.weight"])
def test_weights_that_are_not_finite_are_refused_when_they_are_read(folder: Path, name: str, value: float) -> None:
    change_weights(folder, lambda t: t[name][..., -1].fill_(value))
    model = load(folder)
    with pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
        model.state_dict()
    with torch.inference_mode(), pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
        load(folder)(torch.arange(23).unsqueeze(0))


def test_a_folder_without_weights_says_what_it_lacks(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors in it" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pytorch_model.bin: pickled weights can run code" in refused(folder)
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "no config.json in it" in refused(tmp_path)


BYTES: dict[str, bytes] = {
    "empty": b"",
    "garbage": bytes(range(256)) * 4,
    "endless-header": b"\xff" * 8 + b"{}",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES.keys())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_another_kind_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert name in refused(folder)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"model_type": "deepseek_v3"}', "NaN"])
def test_json_of_another_kind_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in refused(folder)
    with pytest.raises(InputError):
        load_config(folder)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    assert "model.safetensors" in refused(folder)


def corrupted(content: bytes, rng: random.Random, reach: int) -> bytes:
    """Some bytes changed, removed or cut off within the first `reach`."""
    place = rng.randrange(min(reach, len(content)))
    match rng.randrange(4):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + content[place + rng.randint(1, 9) :]
        case 2:
            return content[:place] + bytes([rng.choice(b'0123456789{}[]",:-.eE')]) + content[place + 1 :]
        case _:
            return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_corrupted_folder_is_an_error_or_a_model(folder: Path, name: str) -> None:
    file = folder / name
    content = file.read_bytes()
    header = len(content) if name == "config.json" else 8 + int.from_bytes(content[:8], "little")
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        file.write_bytes(corrupted(content, rng, header))
        try:
            load(folder)
        except InputError as error:
            assert str(folder) in str(error), f"seed {seed}"
