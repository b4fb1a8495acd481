"""Where a model comes from: presets, folders, indices and GGUF files; and what a wrong source is told."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_gguf_files import CASES, ROTARY_FACTORS, field, header, small, tensor, text, written
from plan_released_shapes import GPT_OSS_20B

import gguf
from moekit.config.errors import InputError
from moekit.config.families import FAMILIES, family_for
from moekit.config.model import ModelConfig
from moekit.config.presets.load import load_run
from moekit.config.quantisation import Fp8Blocks, write_quantisation
from moekit.plan.blueprint import Blueprint
from moekit.plan.from_config import blueprint_of
from moekit.plan.gguf import TYPES, read_gguf
from moekit.plan.sources import blueprint_from, preset_names


def stored(blueprint: Blueprint) -> int:
    return sum(weight.stored for weight in blueprint.weights)


def config_file(folder: Path, config: ModelConfig, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps((family_for(config).to_hub(config) or {}) | more))
    return path


def refused(source: object) -> InputError:
    with pytest.raises(InputError) as caught:
        blueprint_from(str(source))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", preset_names())
def test_every_name_is_a_model(name: str) -> None:
    blueprint = blueprint_from(name)
    assert blueprint.name == name
    assert stored(blueprint) > 0


def test_file_and_folder_and_index_are_one_model(tmp_path: Path) -> None:
    config = load_run("olmoe-1b-7b").model
    found = blueprint_from(str(config_file(tmp_path, config)))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    assert found == blueprint_from(str(tmp_path)) == blueprint_from(str(index))
    assert found == blueprint_of(config, tmp_path.name, "olmoe")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-moe-16b", "qwen3-30b-a3b", "mixtral-8x7b"])
def test_a_preset_is_what_its_config_json_says(name: str, tmp_path: Path) -> None:
    preset = blueprint_from(name)
    quantised = {"quantization_config": write_quantisation(Fp8Blocks())} if preset.quantisation else {}
    config_file(tmp_path, load_run(name).model, **quantised)
    assert blueprint_from(str(tmp_path))._replace(name=name) == preset


def test_all_model_types_are_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    hint = refused(tmp_path).hint
    assert all(family.model_type in hint for family in FAMILIES)
    assert "gpt_oss" in hint


def test_a_family_that_moekit_does_not_run_is_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_20B))
    assert stored(blueprint_from(str(tmp_path))) == 20_914_757_184


def test_blocks_of_another_size_are_told(tmp_path: Path) -> None:
    blocks = write_quantisation(Fp8Blocks(64, 32))
    config_file(tmp_path, load_run("tiny").model, quantization_config=blocks)
    blueprint = blueprint_from(str(tmp_path))
    assert blueprint.quantisation == "fp8"
    assert "64 x 32" in blueprint.notes[0]


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_has_the_shape_of_its_model(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    blueprint = blueprint_from(str(written(config, tmp_path / "model.gguf")))
    expected = blueprint_of(config, "model", case.split(maxsplit=1)[0], "bfloat16")
    assert blueprint._replace(notes=()) == expected._replace(max_positions=blueprint.max_positions)
    assert blueprint.max_positions == config.max_positions
    assert len(blueprint.notes) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_holds_what_the_package_finds_in_it(case: str, tmp_path: Path) -> None:
    path = written(CASES[case], tmp_path / "model.gguf")
    package = gguf.GGUFReader(path)
    found = read_gguf(path)
    expected = {
        one.name: (tuple(int(size) for size in one.shape[::-1]), int(one.tensor_type)) for one in package.tensors
    }
    assert {name: (one.shape, one.type) for name, one in found.tensors.items()} == expected
    assert found.bytes == sum(int(one.n_bytes) for one in package.tensors)
    assert found.parameters == stored(blueprint_from(str(path)))


def test_constants_in_a_gguf_file_are_no_parameters(tmp_path: Path) -> None:
    blueprint = blueprint_from(str(written(ROTARY_FACTORS, tmp_path / "model.gguf")))
    assert stored(blueprint) == stored(blueprint_of(ROTARY_FACTORS, "model", "llama"))
    assert blueprint.notes[1].startswith("that is 8 more")
    assert "8 in rope_freqs.weight" in blueprint.notes[1]


def test_a_quantised_file_names_the_type_of_most_weights(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    config = small(dense_layers=(0, 1, 2), dense_width=128)
    source, target = written(config, tmp_path / "whole.gguf", "float16"), tmp_path / "quantised.gguf"
    choice = llama_cpp.llama_model_quantize_default_params()
    choice.ftype, choice.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), choice) == 0
    blueprint = blueprint_from(str(target))
    assert blueprint.quantisation == "Q8_0"
    assert stored(blueprint) == stored(blueprint_from(str(source)))
    size = sum(int(one.n_bytes) for one in gguf.GGUFReader(target).tensors)
    assert f"in {size:,} bytes" in blueprint.notes[0]


def test_types_take_the_bytes_that_ggml_gives_them() -> None:
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: (numbers, size) for kind, (_, numbers, size) in TYPES.items()} == {
        kind: sizes[kind] for kind in TYPES
    }


def test_a_split_file_is_one_model(tmp_path: Path) -> None:
    config = CASES["qwen3moe"]
    whole = written(config, tmp_path / "whole.gguf")
    paths = split(whole, tmp_path, 3)
    expected = blueprint_from(str(whole))
    for path in paths:
        assert blueprint_from(str(path))._replace(name="whole") == expected
    paths[1].unlink()
    assert paths[1].name in str(refused(paths[0]))


def test_older_files_hold_keys_and_values_of_latents_twice(tmp_path: Path) -> None:
    """They name the widths of whole heads, and keep the matrix from which the absorbed ones were cut."""
    config = CASES["deepseek2 of groups"]
    package = gguf.GGUFReader(written(config, tmp_path / "new.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    older = {"key_length": 20, "value_length": 10, "head_count_kv": 3}
    for key, entry in package.fields.items():
        if key.startswith("deepseek2.") and not key.endswith("_mla"):
            value = older.get(key.removeprefix("deepseek2.attention."), entry.contents())
            writer.add_key_value(key, value, entry.types[0])
    for one in package.tensors:
        writer.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
    for layer in range(3):
        writer.add_tensor(f"blk.{layer}.attn_kv_b.weight", np.zeros((3 * (12 + 10), 20), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    blueprint = blueprint_from(str(tmp_path / "old.gguf"))
    assert stored(blueprint) == stored(blueprint_of(config, "model", "deepseek2"))
    assert f"{3 * 66 * 20:,} in attn_kv_b.weight" in blueprint.notes[1]


def split(whole: Path, folder: Path, count: int) -> list[Path]:
    """The tensors of a file dealt out to several, each with all metadata but the type of the whole."""
    package = gguf.GGUFReader(whole)
    paths = [folder / f"part-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "qwen3moe")
        for key, entry in package.fields.items():
            if key.startswith("qwen3moe."):
                writer.add_key_value(key, entry.contents(), entry.types[0])
        writer.add_uint16("split.count", count)
        for one in package.tensors[number::count]:
            writer.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    words = struct.pack("<IQ", 8, 200_000) + text("token") * 200_000
    scores = struct.pack("<IQ", 6, 200_000) + bytes(800_000)
    path = tmp_path / "model.gguf"
    fields = [
        field("words", 9, words),
        field("scores", 9, scores),
        field("heads", 9, struct.pack("<IQ3I", 4, 3, 5, 6, 7)),
        field("size", 10, struct.pack("<Q", 2**40)),
    ]
    path.write_bytes(header(fields, [tensor("x", (3, 5))]) + bytes(60 + 32))
    found = read_gguf(path)
    assert found.fields == {"words": None, "scores": None, "heads": (5, 6, 7), "size": 2**40}
    assert found.tensors["x"].shape == (5, 3)


ONE = [tensor("x", (3, 5))]

DAMAGED = {
    "only its first bytes": b"GGUF",
    "a version of tomorrow": header([], ONE, version=99) + bytes(60),
    "no tensors": header([], []) + bytes(60),
    "too many fields": b"GGUF" + struct.pack("<IQQ", 3, 1, 2**62) + bytes(4000),
    "too many tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 1) + bytes(4000),
    "a name longer than the file": header([struct.pack("<Q", 2**63) + b"x"], ONE),
    "a value of no type": header([field("x", 77, b"")], ONE) + bytes(60),
    "a list of no type": header([field("x", 9, struct.pack("<IQ", 77, 1))], ONE) + bytes(60),
    "a list of lists": header([field("x", 9, struct.pack("<IQ", 9, 1))], ONE) + bytes(60),
    "a list longer than the file": header([field("x", 9, struct.pack("<IQ", 4, 2**61))], ONE) + bytes(60),
    "a list of too many texts": header([field("x", 9, struct.pack("<IQ", 8, 2**61))], ONE) + bytes(60),
    "a text that leads out": header([field("x", 9, struct.pack("<IQQ", 8, 1, 2**63))], ONE) + bytes(60),
    "a tensor of no dimension": header([], [tensor("x", ())]) + bytes(60),
    "a tensor of many dimensions": header([], [tensor("x", (1,) * 9)]) + bytes(60),
    "a tensor without numbers": header([], [tensor("x", (3, 0))]) + bytes(60),
    "tensors cut off": header([], ONE) + bytes(59),
    "zeros behind the magic": b"GGUF" + bytes(10_000),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_gguf_file_is_an_error(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(DAMAGED[case])
    assert str(path) in str(refused(path))


def test_a_gguf_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = written(CASES["deepseek2"], tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "model.gguf"
    for length in range(0, len(whole), 997):
        path.write_bytes(whole[:length])
        refused(path)


def test_metadata_that_makes_no_model_is_named(tmp_path: Path) -> None:
    architecture = field("general.architecture", 8, text("llama"))
    path = tmp_path / "model.gguf"
    path.write_bytes(header([architecture], [tensor("token_embd.weight", (3, 5))]) + bytes(100))
    assert "llama.block_count" in str(refused(path))
    path.write_bytes(header([field("general.architecture", 8, text("mamba"))], ONE) + bytes(100))
    assert "mamba" in str(refused(path))
    path.write_bytes(header([architecture, field("llama.block_count", 4, struct.pack("<I", 2**31))], ONE) + bytes(100))
    assert "llama.block_count" in str(refused(path))


def test_gigabytes_of_something_else_are_not_read(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.json", "model.bin", "config.json", "x.safetensors"):
        path = tmp_path / name
        with path.open("wb") as opened:
            opened.truncate(2**36)
        refused(path)
        path.unlink()


def test_a_pickle_and_an_empty_folder_are_told_what_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    assert "config.json" in refused(path).hint
    path.rename(tmp_path / "model.json")
    refused(tmp_path / "model.json")
    (tmp_path / "empty").mkdir()
    assert "config.json" in str(refused(tmp_path / "empty"))
    (tmp_path / "model.json").rename(tmp_path / "config.json")
    refused(tmp_path)


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    path = written(CASES["llama"], tmp_path / "model.gguf")
    assert str(path) in refused(tmp_path).hint


def test_an_index_without_its_config_says_what_is_missing(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {}}')
    assert "config.json" in str(refused(index))
    shutil.copy(index, tmp_path / "index.json")
    assert "index" in str(refused(tmp_path / "index.json"))


def test_a_name_that_is_nearly_right_is_corrected() -> None:
    assert "deepseek-v3" in refused("deepseek-v33").hint
    assert "olmoe-1b-7b" in refused("zzz").hint


@pytest.mark.parametrize("source", ["", "\0", "x" * 5000, "/dev/zero", "/dev/null"])
def test_what_is_no_model_is_an_error(source: str) -> None:
    refused(source)


def test_an_error_in_config_json_names_the_file_and_the_field(tmp_path: Path) -> None:
    path = config_file(tmp_path, replace(load_run("olmoe-1b-7b").model), extra_experts=3)
    message = str(refused(path))
    assert str(path) in message
    assert "extra_experts" in message


def test_counting_needs_neither_torch_nor_numpy() -> None:
    script = (
        "import sys; from moekit.plan.sources import *; from moekit.plan.parameters import parameters;"
        "[parameters(blueprint_from(name)) for name in preset_names()]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "gguf", "transformers"} & set(done.stdout.split())


def test_tensors_that_compute_nothing_are_stored_all_the_same(tmp_path: Path) -> None:
    """Qwen2-MoE without a shared expert still has the gate of one: 1 x 16 in each of 2 layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_attention_heads": 2}
    counts = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 32}
    rest = {"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    data = {"model_type": "qwen2_moe", **sizes, **counts, **rest}
    stored = []
    for width in (0, 8):
        (tmp_path / "config.json").write_text(json.dumps(data | {"shared_expert_intermediate_size": width}))
        stored.append(sum(weight.stored for weight in blueprint_from(str(tmp_path)).weights))
    assert stored[1] - stored[0] == 2 * 3 * 8 * 16
