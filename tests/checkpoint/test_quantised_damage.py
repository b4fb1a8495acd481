"""A damaged quantised folder is one clear error, and never a silently wrong model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_cases import divisible, quantised_folder, tensors
from safetensors.torch import save_file
from torch import Tensor

from moekit.checkpoint.convert import convert
from moekit.checkpoint.load import load
from moekit.config.errors import InputError
from moekit.kernels.groups import quantise


def rewritten(folder: Path, **changed: Any) -> None:
    """The tensors in `changed` replaced, their names with dots for `__`."""
    save_file(
        tensors(folder) | {name.replace("__", "."): t for name, t in changed.items()}, folder / "model.safetensors"
    )


def configured(folder: Path, **changed: Any) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] |= changed
    file.write_text(json.dumps({key: value for key, value in data.items() if key != "nothing"}))


GATE = "model__layers__1__mlp__experts__2__gate_proj__weight"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bits": 3}, r"quantization_config.bits`: 3 is not 8 or 4"),
        ({"bits": True}, r"quantization_config.bits`: True is not 8 or 4"),
        ({"group_size": 48}, r"quantization_config.group_size`: 48 is not 32 or 64 or 128"),
        ({"group_size": None}, r"group_size`: None is not"),
        ({"layout": 0}, r"quantization_config.layout`: 0 is not 1"),
        ({"kept": "head"}, r"quantization_config.kept`: 'head' is no list"),
        ({"quant_method": "gptq"}, r"quant_method`: 'gptq' is not supported"),
        ({"bits": 8}, r"in int8/32 is"),
        ({"group_size": 64}, r"int4/64"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"of type U8, but config.json has no"),
    ],
)
def test_a_damaged_description_is_one_error(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = quantised_folder(divisible(), tmp_path)
    configured(folder, **changed)
    with pytest.raises(InputError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (
            torch.zeros(32, 39, dtype=torch.uint8),
            r"gate_proj.weight is U8 \[32, 39\], but \[32, 64\] in int4/32 is \[32, 40\]",
        ),
        (torch.zeros(32, 64, dtype=torch.uint8), r"is \[32, 40\]"),
        (torch.zeros(40, dtype=torch.uint8), r"is U8 \[40\]"),
        (torch.zeros(32, 64), r"is quantised, but other tensors of layers.1.feed_forward.experts are not"),
        (torch.zeros(32, 64, dtype=torch.int8), r"is of type I8"),
    ],
    ids=["a byte less", "whole numbers without scales", "flat", "one alone in float32", "signed"],
)
def test_damaged_rows_are_one_error(tensor: Tensor, words: str, tmp_path: Path) -> None:
    folder = quantised_folder(divisible(), tmp_path)
    rewritten(folder, **{GATE: tensor})
    with pytest.raises(InputError, match=words):
        load(folder)


def test_what_nothing_can_compute_with_is_refused(tmp_path: Path) -> None:
    folder = quantised_folder(divisible(), tmp_path)
    rewritten(folder, model__embed_tokens__weight=torch.zeros(23, 40, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"embed_tokens.weight is quantised, which moekit keeps as it is"):
        load(folder)


def test_scales_that_are_not_finite_are_found_when_they_are_read(tmp_path: Path) -> None:
    folder = quantised_folder(divisible(), tmp_path)
    for value in (torch.inf, torch.nan):
        weight = torch.randn(32, 64)
        weight[3, 5] = value
        rewritten(folder, **{GATE: quantise(weight, 4, 32).rows})
        name = GATE.replace("__", ".")
        with pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
            load(folder).state_dict()
        with pytest.raises(InputError, match=f"{name} holds numbers that are not finite"):
            convert(folder, tmp_path / "there")
    assert not (tmp_path / "there").exists()
