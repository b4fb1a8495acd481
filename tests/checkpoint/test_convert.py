"""Conversion keeps every number it can, and leaves nothing behind where it cannot."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import moe, random_ids, random_model, small
from safetensors.torch import load_file, save_file

from moekit.checkpoint.convert import convert
from moekit.checkpoint.load import load
from moekit.checkpoint.save import save, save_model
from moekit.cli.convert import parse_size
from moekit.cli.main import main
from moekit.config.errors import InputError
from moekit.config.routing import ExpertChoiceRouting
from moekit.data.tokenizer import train_tokenizer
from moekit.tensors.fp8 import round_blocks

CONFIG = small(mtp_depth=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(random_model(CONFIG).state_dict(), CONFIG, tmp_path / "source", None)
    return tmp_path / "source"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
def test_without_a_type_every_bit_stays(source: Path, shard_bytes: int, tmp_path: Path) -> None:
    convert(source, tmp_path / "there", None, shard_bytes)
    convert(tmp_path / "there", tmp_path / "back")
    assert_equal(tensors(tmp_path / "there"), tensors(source))
    assert_equal(tensors(tmp_path / "back"), tensors(source))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_rounds_all_but_the_selection_bias(source: Path, dtype: str, tmp_path: Path) -> None:
    convert(source, tmp_path / "there", dtype)
    for name, tensor in tensors(tmp_path / "there").items():
        original = tensors(source)[name]
        wanted = original if name.endswith("e_score_correction_bias") else original.to(getattr(torch, dtype))
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted), name
    data = json.loads((tmp_path / "there" / "config.json").read_text())
    assert data["torch_dtype"] == dtype
    assert load(tmp_path / "there").norm.weight.dtype == getattr(torch, dtype)


def test_fp8_holds_the_products_of_the_blocks_and_loads_as_their_rounding(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "there", "fp8", 3000)
    found = tensors(tmp_path / "there")
    quantised = {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    matrices = {name for name, t in tensors(source).items() if "layers" in name and t.dim() == 2}
    kept = ("mlp.gate.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight")
    assert quantised == {name for name in matrices if not name.endswith(kept)}
    assert found.keys() == tensors(source).keys() | {f"{name}_scale_inv" for name in quantised}
    loaded = load(tmp_path / "there", "float32")
    gate = tensors(source)["model.layers.1.mlp.experts.2.gate_proj.weight"]
    assert torch.equal(loaded.layers[1].feed_forward.experts.gate_up[2, : len(gate)], round_blocks(gate))
    assert torch.equal(loaded.embedding.weight, tensors(source)["model.embed_tokens.weight"].bfloat16().float())
    assert load(tmp_path / "there").norm.weight.dtype == torch.bfloat16


def test_fp8_stays_as_it_is_and_becomes_plain_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "blocks", "fp8")
    for name, dtype in (("same", None), ("again", "fp8")):
        convert(tmp_path / "blocks", tmp_path / name, dtype)
        assert_equal(tensors(tmp_path / name), tensors(tmp_path / "blocks"))
    convert(tmp_path / "blocks", tmp_path / "plain", "float32")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    found, expected = load(tmp_path / "plain"), load(tmp_path / "blocks", "float32")
    with torch.inference_mode():
        torch.testing.assert_close(found(random_ids()).logits, expected(random_ids()).logits, rtol=1e-5, atol=1e-5)


def test_blocks_of_another_size_and_scales_are_followed(source: Path, tmp_path: Path) -> None:
    """Released files may have blocks of any size."""
    content = tensors(source)
    name = "model.layers.0.self_attn.o_proj.weight"
    values = torch.full((12, 10), 2.0).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 13.0).view(4, 3)
    save_file(content | {name: values, f"{name}_scale_inv": scale}, source / "model.safetensors")
    data = json.loads((source / "config.json").read_text())
    block = {"quant_method": "fp8", "weight_block_size": [3, 4], "fmt": "e4m3"}
    (source / "config.json").write_text(json.dumps(data | {"quantization_config": block}))
    expected = 2 * scale.repeat_interleave(3, 0).repeat_interleave(4, 1)[:, :10]
    assert torch.equal(load(source, "float32").layers[0].attention.out.weight, expected)


def test_tokenizer_and_generation_go_along(tmp_path: Path) -> None:
    texts = ["a small text to learn from, again and again"] * 5
    tokenizer = train_tokenizer(texts, 270)
    model = random_model(small(vocab_size=270))
    save(model, tmp_path / "source", tokenizer)
    for name in ("modeling_own.py", "metrics.jsonl", "run.json"):
        (tmp_path / "source" / name).write_text("{}")
    convert(tmp_path / "source", tmp_path / "there", "bfloat16")
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_own.py"}
    assert {entry.name for entry in (tmp_path / "there").iterdir()} == names | {"config.json", "model.safetensors"}


def test_numbers_that_are_not_finite_are_not_passed_on(source: Path, tmp_path: Path) -> None:
    content = tensors(source)
    content["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] = float("nan")
    save_file(content, source / "model.safetensors")
    for dtype in (None, "bfloat16", "fp8"):
        with pytest.raises(InputError, match=r"experts.3.up_proj.weight holds numbers that are not finite"):
            convert(source, tmp_path / "there", dtype)
        assert {entry.name for entry in tmp_path.iterdir()} == {"source"}


def test_a_target_that_exists_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["convert", str(source), str(tmp_path / "mine")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(source), str(source)]) == 2
    assert load(source)


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    config = small(width=256, moe=moe(), n_layers=6, dense_layers=())
    save_model(random_model(config).state_dict(), config, tmp_path / "source", None)
    slow = (
        "import sys, time; from pathlib import Path; from moekit.checkpoint.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'bfloat16', 10**4, lambda done, total: time.sleep(0.05))"
    )
    for wait in (0, 3, 9):
        target = tmp_path / f"there-{wait}"
        child = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path / "source"), str(target)])
        building = tmp_path / f".there-{wait}.writing"
        while len(list(building.glob("*"))) <= wait and child.poll() is None:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not target.exists()
        assert main(["convert", str(tmp_path / "source"), str(target)]) == 0
        assert load(target).norm.weight.shape == (256,)
        shutil.rmtree(target)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5GiB", 3 * 2**29), ("700 mb", 7 * 10**8), ("9", 9)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 bananas", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model that no family of the hub expresses, with a table and a threshold in it."""
    config = replace(CONFIG, moe=replace(CONFIG.moe, routing=ExpertChoiceRouting(decode="threshold"), balance=()))
    save_model(random_model(config).state_dict(), config, tmp_path / "own", None)
    return tmp_path / "own"


def test_a_model_of_our_own_family_is_read_again_with_its_state_in_float32(own: Path, tmp_path: Path) -> None:
    convert(own, tmp_path / "there", "bfloat16")
    model = load(tmp_path / "there")
    assert model.config == load(own).config
    before = {name: p for name, p in load(own).named_parameters() if not p.requires_grad}
    assert before
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    assert after["head.weight"].dtype == torch.bfloat16


def test_fp8_is_refused_where_no_other_program_knows_the_model(own: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no other program"):
        convert(own, tmp_path / "there", "fp8")
    assert not (tmp_path / "there").exists()
