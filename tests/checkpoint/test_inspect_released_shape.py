"""A folder of DeepSeek-V3's shape, with holes for weights: it is described and opened by its headers alone."""

import json
from pathlib import Path

import pytest
import torch
from test_released_config import RELEASED

from moekit.checkpoint.folder import INDEX
from moekit.checkpoint.header import write_header
from moekit.checkpoint.inspect import inspect
from moekit.checkpoint.load import load
from moekit.checkpoint.pieces import piece_shape, pieces
from moekit.checkpoint.shards import Entry, split
from moekit.config.families import family_named
from moekit.config.quantisation import KEY, SCALE, Fp8Blocks, write_quantisation
from moekit.model.transformer import Transformer
from moekit.moe.experts import Experts

UNQUANTISED = ("mlp.gate.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight")


def stored_types(name: str, shape: tuple[int, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    """How the released checkpoint stores a tensor: matrices of layers in FP8 blocks, selection biases in float32."""
    if name.endswith("e_score_correction_bias"):
        return [(name, "F32", shape)]
    if len(shape) != 2 or not name.startswith("model.layers.") or name.endswith(UNQUANTISED):
        return [(name, "BF16", shape)]
    blocks = tuple(-(-size // 128) for size in shape)
    return [(name, "F8_E4M3", shape), (name + SCALE, "F32", blocks)]


def never() -> torch.Tensor:
    raise AssertionError("the weights are holes")


def write_released_shape(folder: Path) -> None:
    """163 sparse shards with the names, types and shapes of DeepSeek-V3's, the index and `config.json`."""
    family = family_named("deepseek_v3", "here")
    config = family.from_hub(RELEASED)
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}
    shapes = {piece.hub: piece_shape(ours[piece.ours], piece) for piece in pieces(ours, family.names(config))}
    shapes |= {copy: ours[original] for copy, original in family.copies(config).items()}
    entries = [Entry(*stored, never) for name, shape in shapes.items() for stored in stored_types(name, shape)]
    shards = split(entries, 4_245_000_000)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):06}.safetensors"
        header = write_header((entry.name, entry.dtype, entry.shape) for entry in shard)
        with file.open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + sum(entry.bytes for entry in shard))
        weight_map |= {entry.name: file.name for entry in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    (folder / "config.json").write_text(json.dumps(RELEASED | {KEY: write_quantisation(Fp8Blocks())}), "utf-8")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    write_released_shape(folder)
    return folder


def test_every_number_of_the_released_checkpoint_is_accounted_for_by_headers_alone(released: Path) -> None:
    found = inspect(released)
    assert not found.problems
    assert found.values.state == "finite"
    assert len(found.shards) == 163
    assert sum(shard.tensors for shard in found.shards) == 91_991
    numbers = {kind: space.numbers for kind, space in found.dtypes.items()}
    assert numbers["F8_E4M3"] == 680_571_043_840
    assert numbers["BF16"] == 3_918_786_560
    assert numbers["F32"] + numbers["F32 scales"] == 41_555_600
    assert sum(numbers.values()) == 684_531_386_000
    assert found.dtypes["F32 scales"].tensors == found.dtypes["F8_E4M3"].tensors
    assert set(found.copies) == {f"model.layers.61.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    assert found.parts is not None
    assert sum(count.total for count in found.parts.values()) == 682_636_487_424
    assert sum(count.active for count in found.parts.values()) == 37_552_297_472


def test_a_tensor_of_a_folder_larger_than_memory_is_read_alone(released: Path) -> None:
    model = load(released)
    assert model.norm.weight.shape == (7168,)
    assert not model.norm.weight.any()
    experts = model.layers[60].get_submodule("feed_forward.experts")
    assert isinstance(experts, Experts)
    assert experts.stored is not None
    gate_up, down = experts.stored(255)
    assert (gate_up.shape, down.shape, gate_up.dtype) == ((4096, 7168), (7168, 2048), torch.bfloat16)
