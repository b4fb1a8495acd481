"""The attention half of a block in one compiled call equals its parts, for one new token of each sequence."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moekit.config.model import GQAConfig, ModelConfig
from moekit.config.quantisation import Groups
from moekit.kernels.groups import quantise
from moekit.kernels.library import library
from moekit.model.block import Block
from moekit.model.cache import LayerCache
from moekit.model.transformer import Transformer
from oracle.compare import relative_error

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")

WIDTH = 64
SHAPES = (
    {},
    {"n_kv_heads": 1, "qkv_bias": True},
    {"n_kv_heads": 2, "qk_norm": "head"},
    {"qk_norm": "full", "clip_qkv": 0.7},
    {"clip_qkv": 0.5, "out_bias": True},
)


def model_of(shape: dict[str, Any], groups: Groups | None, dtype: torch.dtype, seed: int) -> Transformer:
    attention = GQAConfig(**{"n_heads": 4, "n_kv_heads": 4, "head_dim": 16, **shape})
    config = ModelConfig(vocab_size=32, width=WIDTH, n_layers=1, dense_layers=(0,), dense_width=64, attention=attention)
    model = Transformer(config).requires_grad_(False).to(dtype).eval()
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2, generator=source)
    attend = model.layers[0].attention
    for layer in (attend.q, attend.k, attend.v, attend.out) if groups is not None else ():
        rows = quantise(layer.weight.float(), groups.bits, groups.size).rows
        layer.groups, layer.weight = groups, nn.Parameter(rows, requires_grad=False)
    return model


def parts(block: Block, x: torch.Tensor, context: Any, cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    return block.feed_forward_norm.of_sum(x, block.attention(block.attention_norm(x), context, cache))


@pytest.mark.parametrize("level", [0, 1, 2])
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.sampled_from(SHAPES),
    groups=st.sampled_from([None, Groups(4, 64), Groups(8, 32)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 8),
    past=st.integers(0, 5),
)
@torch.inference_mode()
def test_one_call_equals_the_parts(
    level: int, seed: int, shape: dict[str, Any], groups: Groups | None, dtype: torch.dtype, batch: int, past: int
) -> None:
    if library().moekit_level() < level:
        pytest.skip(f"this machine has not the instructions of level {level}")
    groups = groups or (Groups(4, 32) if dtype == torch.float32 else None)
    model = model_of(shape, groups, dtype, seed)
    block, source = model.layers[0], torch.Generator().manual_seed(seed)
    own, other = model.new_cache(8), model.new_cache(8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(library(), "moekit_level", lambda: level)
        for _ in range(past + 1):
            x = torch.randn(batch, 1, WIDTH, generator=source).to(dtype)
            context = model._context(torch.zeros(batch, 1, dtype=torch.long), own, None)
            found = block.attention.step(x, block.attention_norm, block.feed_forward_norm, context, own.layers[0])
            assert found is not None
            for one, expected in zip(found, parts(block, x, context, other.layers[0]), strict=True):
                assert one.dtype == dtype
                assert relative_error(one, expected) <= (2e-2 if dtype == torch.bfloat16 else 1e-3)
    for one, expected in zip(own.layers[0].rooms.values(), other.layers[0].rooms.values(), strict=True):
        assert relative_error(one[:, :, : past + 1], expected[:, :, : past + 1]) <= 2e-2


@pytest.mark.parametrize(
    "listener", ["attention", "attention.q", "attention.out", "attention_norm", "feed_forward_norm"]
)
@torch.inference_mode()
def test_who_listens_to_a_part_hears_it(listener: str) -> None:
    model = model_of({}, Groups(4, 32), torch.bfloat16, 0)
    heard = []
    model.layers[0].get_submodule(listener).register_forward_hook(lambda *_: heard.append(listener))
    cache = model.new_cache(4)
    for token in (1, 2):
        model(torch.tensor([[token]]), cache)
    assert heard == [listener] * 2


@torch.inference_mode()
def test_several_tokens_padding_and_many_sequences_take_the_parts() -> None:
    model = model_of({}, Groups(4, 32), torch.bfloat16, 0)
    block = model.layers[0]
    for batch, length, mask in ((1, 2, None), (9, 1, None), (2, 1, torch.tensor([[True], [False]]))):
        cache = model.new_cache(4)
        context = model._context(torch.zeros(batch, length, dtype=torch.long), cache, mask)
        x = torch.ones(batch, length, WIDTH).bfloat16()
        norms = block.attention_norm, block.feed_forward_norm
        assert block.attention.step(x, *norms, context, cache.layers[0]) is None
        assert cache.layers[0].length == 0
