"""Models with numbers in them that cost no time to draw: for measuring speed and memory, not text."""

from collections.abc import Mapping

import torch
from torch import nn

from moekit.checkpoint.groups import grouped_shape, hold_groups, quantisable
from moekit.config.model import ModelConfig
from moekit.config.quantisation import Groups
from moekit.kernels.groups import quantise
from moekit.model.transformer import Transformer
from moekit.tensors import Float, Tensor
from moekit.tensors.memory import prefer_huge_pages

DRAWN = 1 << 20
"""Random numbers that are drawn; tensors repeat them."""

TILE = 256
"""Rows of a quantised matrix that are drawn; all others repeat them."""


@torch.no_grad()
def random_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model in `dtype`, ready for evaluation, with weights of a trained model's size."""
    with torch.device("meta"):
        model = Transformer(config)
    model = _in_memory(model.to(dtype))
    fill(model)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model


@torch.no_grad()
def random_quantised(config: ModelConfig, groups: Groups) -> Transformer:
    """As `random_model` in bfloat16, with all matrices in groups that `moekit quantize` would quantise."""
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    tensors = dict(model.named_parameters())
    inputs = {name: tensors[name].shape[-1] for name in quantisable(model) if _divides(tensors[name], groups)}
    hold_groups(model, inputs, groups)
    model = _in_memory(model)
    fill(model)
    _fill_groups(model, inputs, groups)
    return model


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Put the same random numbers into every matrix, scaled by its inputs; biases become 0, other vectors 1.

    Two modules with matrices of the same shapes, whatever their names, then compute the same.
    """
    for name, parameter in module.named_parameters():
        if parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        fill_matrix(parameter)


@torch.no_grad()
def fill_matrix(matrix: Float[Tensor, "*stack O I"]) -> None:
    """Put random numbers into a matrix or a stack, always the same, scaled by its inputs."""
    numbers = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))
    drawn = (numbers * (1.0 / matrix.shape[-1]) ** 0.5).to(matrix.dtype)
    flat = matrix.view(-1)
    for start in range(0, flat.numel(), DRAWN):
        part = flat[start : start + DRAWN]
        part.copy_(drawn[: len(part)])


def _in_memory(model: Transformer) -> Transformer:
    """`model` with memory like that of files, which moekit maps in huge pages."""
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        prefer_huge_pages(parameter.detach())
    return model


def _divides(tensor: Tensor, groups: Groups) -> bool:
    return grouped_shape(tuple(tensor.shape), groups) is not None


def _fill_groups(model: Transformer, inputs: Mapping[str, int], groups: Groups) -> None:
    """Rows of quantised normal numbers; `inputs` is how many numbers a row of each tensor has."""
    generator = torch.Generator().manual_seed(0)
    tiles = {
        n: quantise(torch.randn(TILE, n, generator=generator) * n**-0.5, groups.bits, groups.size).rows
        for n in sorted(set(inputs.values()))
    }
    for name, parameter in model.named_parameters():
        if name in inputs:
            for part in parameter.view(-1, parameter.shape[-1]).split(TILE):
                part.copy_(tiles[inputs[name]][: len(part)])
