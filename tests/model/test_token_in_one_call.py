"""A token through attention, and through all blocks, in one compiled call gets what its parts give it one by one."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moekit.config.balance import BiasBalance
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.quantisation import Groups
from moekit.kernels import linear
from moekit.kernels.groups import quantise
from moekit.kernels.library import library
from moekit.kernels.mixture import Size, room
from moekit.kernels.token import Rows, run
from moekit.model.cache import Cache
from moekit.model.rope import turn
from moekit.model.token_step import token_step
from moekit.model.transformer import Output, Transformer
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


MLA = {"n_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LATENT_SHAPES = (MLA, {**MLA, "q_lora_rank": 64}, {**MLA, "q_lora_rank": 32, "bias": True, "qk_nope_head_dim": 24})


def model_of(shape: dict[str, Any], groups: Groups | None, dtype: torch.dtype, seed: int) -> Transformer:
    latent = "kv_lora_rank" in shape
    attention = MLAConfig(**shape) if latent else GQAConfig(**{"n_heads": 4, "n_kv_heads": 4, "head_dim": 16, **shape})
    config = ModelConfig(vocab_size=32, width=WIDTH, n_layers=1, dense_layers=(0,), dense_width=64, attention=attention)
    model = Transformer(config).requires_grad_(False).to(dtype).eval()
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2, generator=source)
    attend = model.layers[0].attention
    names = ("q", "k", "v", "q_a", "q_b", "kv_a", "out") if groups is not None else ()
    for layer in (getattr(attend, name) for name in names if hasattr(attend, name)):
        rows = quantise(layer.weight.float(), groups.bits, groups.size).rows
        layer.groups, layer.weight = groups, nn.Parameter(rows, requires_grad=False)
    return model


@pytest.mark.parametrize("level", [0, 1, 2])
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.sampled_from(SHAPES + LATENT_SHAPES),
    groups=st.sampled_from([None, Groups(4, 32), Groups(8, 32)]),
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
            rows = Rows(x.clone(), torch.empty_like(x), turn(context.rotation))
            norms = block.attention_norm, block.feed_forward_norm
            job = block.attention.described(rows, *norms, own.layers[0])
            assert job is not None
            assert run(job, room(Size(0, 0, 0), 0), own.layers[0].count(1)) == 1
            expected_both = block.feed_forward_norm.of_sum(x, block.attention(norms[0](x), context, other.layers[0]))
            for one, expected in zip((rows.stream, rows.normed), expected_both, strict=True):
                assert one.dtype == dtype
                assert relative_error(one, expected) <= (2e-2 if dtype == torch.bfloat16 else 1e-3)
    for name, expected in other.layers[0].rooms.items():
        one = own.layers[0].rooms[name]
        assert relative_error(one[..., : past + 1, :], expected[..., : past + 1, :]) <= 2e-2


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


MIXTURES = (
    MoEConfig(n_routed=6, top_k=2, expert_width=32, n_shared=1),
    MoEConfig(n_routed=8, top_k=3, expert_width=32, n_shared=2, shared_gate=True, balance=(BiasBalance(),)),
)


def mixture_model(moe: MoEConfig, seed: int, dtype: torch.dtype) -> Transformer:
    attention = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=16) if seed % 2 else MLAConfig(**LATENT_SHAPES[1])
    sizes = {"vocab_size": 32, "width": WIDTH, "n_layers": 3, "dense_layers": (0,), "dense_width": 64}
    model = Transformer(ModelConfig(**sizes, attention=attention, moe=moe)).requires_grad_(False).to(dtype).eval()
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0, 0.2, generator=source)
    return model


def plainly(model: Transformer, ids: torch.Tensor, cache: Cache) -> Output:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(linear.few_rows, "library", lambda: None)
        return model(ids, cache)


@given(
    seed=st.integers(0, 2**31 - 1),
    moe=st.sampled_from(MIXTURES),
    batch=st.integers(1, 8),
    prompt=st.integers(1, 3),
)
@torch.inference_mode()
def test_a_token_through_all_blocks_equals_its_parts(seed: int, moe: MoEConfig, batch: int, prompt: int) -> None:
    model = mixture_model(moe, seed, torch.bfloat16)
    ids = torch.randint(0, 32, (batch, prompt + 4), generator=torch.Generator().manual_seed(seed))
    own, other = model.new_cache(8), model.new_cache(8)
    begin = [model(ids[:, :prompt], own), plainly(model, ids[:, :prompt], other)]
    assert relative_error(begin[0].logits, begin[1].logits) < 3e-2
    for place in range(prompt, prompt + 4):
        found, expected = model(ids[:, place : place + 1], own), plainly(model, ids[:, place : place + 1], other)
        assert len(own.programs) == 1
        assert own.length == other.length == place + 1
        for one, two in zip(found.routings, expected.routings, strict=True):
            if not torch.equal(one.experts.sort().values, two.experts.sort().values):
                return  # two experts as good as each other to the rounding: what follows is another text's
            assert one.n_sequences == two.n_sequences
            assert relative_error(one.scores, two.scores) < 3e-2
        assert relative_error(found.logits, expected.logits) < 5e-2


@torch.inference_mode()
def test_mixtures_of_several_sizes_take_the_parts() -> None:
    model, other = mixture_model(MIXTURES[0], 1, torch.bfloat16), mixture_model(MIXTURES[1], 1, torch.bfloat16)
    model.layers[2].feed_forward = other.layers[2].feed_forward
    ids = torch.randint(0, 32, (2, 4), generator=torch.Generator().manual_seed(0))
    cache, whole = model.new_cache(4), model(ids)
    steps = [model(ids[:, place : place + 1], cache) for place in range(4)]
    assert not any(cache.programs.values())
    assert relative_error(torch.cat([step.logits for step in steps], dim=1), whole.logits) < 3e-2
    assert [routing.n_experts for routing in steps[-1].routings] == [6, 8]


@torch.inference_mode()
def test_a_program_ends_where_somebody_listens_or_trains() -> None:
    model, heard, steps = mixture_model(MIXTURES[0], 1, torch.bfloat16), [], []
    ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    cache, whole = model.new_cache(9), model(ids).logits
    layer, hook = model.layers[1].attention.out, None
    for place in range(9):
        if place == 4:
            hook = layer.register_forward_hook(lambda *_: heard.append(cache.length))
        if place == 6:
            hook.remove()
        model.layers[2].feed_forward.router.train(place == 7)
        steps.append(model(ids[:, place : place + 1], cache).logits)
    assert heard == [5, 6]
    assert relative_error(torch.cat(steps, dim=1), whole) < 3e-2


@torch.inference_mode()
def test_a_cache_that_began_with_a_listener_gets_a_program_after_it() -> None:
    model = mixture_model(MIXTURES[0], 1, torch.bfloat16)
    cache = model.new_cache(3)
    hook = model.layers[1].attention.out.register_forward_hook(lambda *_: None)
    model(torch.tensor([[1]]), cache)
    assert not any(cache.programs.values())
    hook.remove()
    model(torch.tensor([[2]]), cache)
    assert any(cache.programs.values())


@torch.inference_mode()
def test_copies_of_a_cache_and_new_rooms_go_their_own_way() -> None:
    model = mixture_model(MIXTURES[0], 1, torch.bfloat16)
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    other = torch.cat([ids[:, :3], ids[:, 3:].flip(1)], dim=1)
    cache = model.new_cache(6)
    for place in range(3):
        model(ids[:, place : place + 1], cache)
    branch, swapped = copy.deepcopy(cache), copy.deepcopy(cache)
    for layer in swapped.layers:
        layer.rooms = {name: room.flip(0) for name, room in layer.rooms.items()}
    model(ids[:, :1], swapped)
    swapped.layers[0].rooms = {name: room.clone() for name, room in swapped.layers[0].rooms.items()}
    for text, own in ((ids, cache), (other, branch)):
        steps = [model(text[:, place : place + 1], own).logits for place in range(3, 6)]
        assert relative_error(torch.cat(steps, dim=1), model(text).logits[:, 3:]) < 3e-2
    again = copy.deepcopy(swapped)
    assert relative_error(model(ids[:, :1], swapped).logits, model(ids[:, :1], again).logits) < 3e-2
    for one, two in zip(swapped.rooms(), again.rooms(), strict=True):
        assert relative_error(one[..., :5, :], two[..., :5, :]) < 3e-2


def test_a_cache_outlives_parameters_that_are_replaced_and_modes_of_inference() -> None:
    model = mixture_model(MIXTURES[1], 1, torch.bfloat16)
    ids, cache = torch.tensor([[3]]), model.new_cache(4)
    with torch.inference_mode():
        model(ids, cache)
    for parameter in model.parameters():
        parameter.data = torch.zeros(0)
    with torch.no_grad():
        program = cache.programs[1, torch.bfloat16]
        found = room(program.size, len(program.mixtures), torch.empty(1, 1, WIDTH).bfloat16())
        assert run(program.jobs, found, 1) == program.n_jobs
    assert found.states.isfinite().all()


@torch.inference_mode()
def test_several_tokens_padding_and_many_sequences_take_the_parts() -> None:
    model = model_of({}, Groups(4, 32), torch.bfloat16, 0)
    for batch, length, mask in ((1, 2, None), (9, 1, None), (2, 1, torch.tensor([[True], [False]]))):
        cache = model.new_cache(4)
        model._context(torch.zeros(batch, length, dtype=torch.long), cache, mask)
        x = torch.ones(batch, length, WIDTH).bfloat16()
        assert token_step(model.config, [*model.layers], model.norm, x, cache) is None
        assert cache.length == 0
