"""Both attentions equal the plain formula, one head and one query at a time."""

import pytest
import torch
from model_cases import ATTENTIONS, ROPES, YARN, randomise, small_config
from torch import Tensor

from moekit.config.model import MLAConfig
from moekit.model.attention import Context, attend
from moekit.model.block import Block
from moekit.model.rope import rotation, softmax_factor
from oracle import attention as oracle
from oracle import rotary
from oracle.compare import relative_error


def turns_of(rope: str, width: int) -> list[float]:
    config = ROPES[rope]
    if config.scaling is None:
        return rotary.frequencies(config.theta, width)
    return rotary.yarn_frequencies(config.theta, width, YARN.factor, YARN.original_max_positions, 32.0, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("rope", ["half", "interleaved", "yarn"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("length", [1, 7])
def test_attention_equals_the_plain_formula(attention: str, rope: str, length: int) -> None:
    config = small_config(attention, rope)
    module = Block(config, 0, dense=True).attention
    randomise(module, seed=length)
    x = torch.randn(2, length, 12, generator=torch.Generator().manual_seed(0))
    a = config.attention
    width = a.qk_rope_head_dim if isinstance(a, MLAConfig) else a.head_dim
    y = module(x, Context(rotation(config.rope, width, torch.arange(length)), None))
    layout = config.rope.layout
    for sequence, result in zip(x, y, strict=True):
        if isinstance(a, MLAConfig):
            expected = oracle.latent_attention(
                sequence, module, turns_of(rope, width), layout, softmax_factor(config.rope)
            )
        else:
            epsilon = config.norm_epsilon
            turns = turns_of(rope, width)
            expected = oracle.grouped_query_attention(sequence, module, turns, layout, epsilon)
        assert relative_error(result, expected) <= 1e-4


def qkv(seed: int, dtype: torch.dtype, v_width: int, length: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    widths = (8, 8, v_width)
    return [torch.randn(2, 3, length, width, generator=source).to(dtype).requires_grad_() for width in widths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v_width", [3, 8, 11])
@pytest.mark.parametrize("length", [1, 9])
def test_training_attention_and_its_gradients_equal_those_in_float64(
    dtype: torch.dtype, v_width: int, length: int
) -> None:
    context = Context(rotation(ROPES["half"], 8, torch.arange(length)), None)
    narrow = qkv(0, dtype, v_width, length)
    wide = [x.detach().double().requires_grad_() for x in narrow]
    out = attend(*narrow, context, 0.3)
    exact = torch.stack(
        [
            torch.stack([((q[t : t + 1] @ k[: t + 1].T * 0.3).softmax(-1) @ v[: t + 1])[0] for t in range(length)])
            for q, k, v in zip(*(x.flatten(0, 1) for x in wide), strict=True)
        ]
    ).view(2, 3, length, v_width)
    rounding = 1e-5 if dtype == torch.float32 else 2**-5
    assert relative_error(out.detach(), exact.detach()) <= rounding
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = torch.autograd.grad(out, narrow, direction)
    theirs = torch.autograd.grad(exact, wide, direction.double())
    scale = max(float(grad.abs().max()) for grad in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert float((one.double() - other).abs().max()) <= rounding * scale
