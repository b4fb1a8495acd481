"""A cache changes how much is computed at once, never the result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import ATTENTIONS, random_ids, small_model
from torch import Tensor

from moekit.model.transformer import Transformer
from oracle.compare import relative_error

chunks = st.lists(st.integers(1, 5), min_size=1, max_size=5)
LENGTH = 9


@torch.no_grad()
def in_chunks(model: Transformer, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = model.new_cache(ids.shape[1])
    return torch.cat([model(part, cache).logits for part in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("sizes", [[9], [8, 1], [1] * 9, [4, 5], [3, 1, 1, 4]], ids=str)
def test_decoding_with_a_cache_equals_the_whole_forward(attention: str, sizes: list[int]) -> None:
    model = small_model(0, attention)
    ids = random_ids(0, 2, LENGTH)
    assert relative_error(in_chunks(model, ids, sizes), model(ids).logits.detach()) <= 1e-5


@pytest.mark.parametrize("rope", ["half", "yarn"])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_decoding_with_a_cache_keeps_positions_in_every_layout(attention: str, rope: str) -> None:
    model = small_model(1, attention, rope)
    ids = random_ids(1, 2, LENGTH)
    assert relative_error(in_chunks(model, ids, [4, 1, 1, 3]), model(ids).logits.detach()) <= 1e-5


@given(sizes=chunks, seed=st.integers(0, 1000))
def test_any_division_into_chunks_gives_the_same_logits(sizes: list[int], seed: int) -> None:
    model = small_model(seed, "mla-compressed-query")
    ids = random_ids(seed, 1, sum(sizes))
    assert relative_error(in_chunks(model, ids, sizes), model(ids).logits.detach()) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_decoding_in_bfloat16_stays_near_the_whole_forward(attention: str) -> None:
    model = small_model(2, attention).to(torch.bfloat16)
    ids = random_ids(2, 2, LENGTH)
    # A router may turn on a rounding: compare where no expert changed.
    full, cached = model(ids), None
    cache = model.new_cache(LENGTH)
    parts = [model(part, cache) for part in ids.split(1, dim=1)]
    cached = torch.cat([part.logits for part in parts], dim=1)
    chosen = torch.stack([part.routings[0].experts for part in parts], dim=1).flatten(0, 1)
    same = (chosen.sort().values == full.routings[0].experts.sort().values).all(dim=-1).view(2, LENGTH)
    before_any_change = same.cumprod(dim=1).bool()
    assert before_any_change.float().mean() > 0.5
    assert relative_error(cached[before_any_change], full.logits[before_any_change]) <= 2**-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "numbers"), [("mla", 6 + 4), ("mla-wide-value", 6 + 4), ("gqa", 2 * 2 * 6), ("mha", 2 * 3 * 4)]
)
def test_the_cache_holds_exactly_this_many_numbers_per_token_and_layer(attention: str, numbers: int) -> None:
    model = small_model(0, attention, n_layers=3)
    cache = model.new_cache(LENGTH)
    model(random_ids(0, 2, LENGTH), cache)
    assert cache.bytes() == 4 * numbers * 3 * 2 * LENGTH
    assert cache.length == LENGTH


@torch.no_grad()
def test_more_tokens_than_the_cache_has_room_for_are_refused() -> None:
    model = small_model(0)
    cache = model.new_cache(4)
    model(random_ids(0, 1, 3), cache)
    with pytest.raises(ValueError, match="room for 4 tokens, not 5"):
        model(random_ids(0, 1, 2), cache)


@torch.no_grad()
def test_two_caches_do_not_know_each_other() -> None:
    model = small_model(0)
    ids, other = random_ids(0, 1, 5), random_ids(1, 1, 5)
    one, two = model.new_cache(5), model.new_cache(5)
    model(ids[:, :4], one)
    model(other, two)
    assert relative_error(model(ids[:, 4:], one).logits, model(ids).logits[:, 4:]) <= 1e-5
