"""Presets have, to the last digit, as many parameters as the published models."""

import pytest
import torch

from moekit.config.presets.load import load_run, preset_names
from moekit.model.transformer import Transformer

PUBLISHED = {
    "deepseek-moe-16b": 16_375_728_128,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
}
"""Elements in the safetensors files on the hub."""


ACTIVE = {
    "deepseek-moe-16b": 2_828_650_496,
    "deepseek-v2-lite": 2_661_150_208,
    "deepseek-v2": 21_375_800_320,
    "deepseek-v3": 37_552_297_472,
    "mixtral-8x7b": 12_879_925_248,
    "olmoe-1b-7b": 1_282_017_280,
    "qwen1.5-moe-a2.7b": 2_689_173_504,
    "qwen3-30b-a3b": 3_353_032_704,
}
"""Parameters that compute one token, embedding and head included, from the released shapes."""


def hollow(name: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(load_run(name).model)


def count(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert count(hollow(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_uses_the_published_number_of_them(name: str) -> None:
    model = hollow(name)
    assert model.size() == (count(model), ACTIVE[name])


def test_deepseek_v3_has_the_published_parameters_selection_biases_included() -> None:
    model = hollow("deepseek-v3")
    second = count(model.mtp)
    assert second == 11_610_068_224
    assert count(model) - second == 671_026_419_200
    # Released files repeat the embedding and the head for the prediction module.
    assert count(model) + count(model.embedding) + count(model.head) == 684_489_845_504


def test_the_selection_biases_of_deepseek_v3_are_a_number_for_each_router_and_expert() -> None:
    biases = [layer.balance["bias"].bias().numel() for layer in hollow("deepseek-v3").moe_layers()]
    assert sum(biases) == 59 * 256


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_built_without_memory(name: str) -> None:
    assert all(parameter.is_meta for parameter in hollow(name).parameters())
