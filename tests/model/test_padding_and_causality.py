"""What a token may not see does not move its logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import ATTENTIONS, random_ids, small_model
from torch import Tensor

from moekit.moe.stats import load
from oracle.compare import relative_error

every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def padded(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences of several lengths as ids [B S] with padding on the left, and the mask of real tokens."""
    length = max(map(len, sequences))
    ids, mask = torch.zeros(2, len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, length - len(sequence) :] = sequence
        mask[row, length - len(sequence) :] = 1
    return ids, mask.bool()


@torch.no_grad()
@every_attention
@pytest.mark.parametrize("rope", ["half", "yarn"])
def test_left_padding_equals_no_padding(attention: str, rope: str) -> None:
    model = small_model(0, attention, rope)
    sequences = [random_ids(seed, length) for seed, length in enumerate((7, 3, 1))]
    ids, mask = padded(sequences)
    logits = model(ids, mask=mask).logits
    assert logits.isfinite().all()
    for row, sequence in zip(logits, sequences, strict=True):
        assert relative_error(row[-len(sequence) :], model(sequence[None]).logits[0]) <= 1e-5


@torch.no_grad()
@every_attention
def test_decoding_after_a_padded_prompt_equals_no_padding(attention: str) -> None:
    model = small_model(1, attention)
    sequences = [random_ids(seed, length) for seed, length in enumerate((9, 6))]
    ids, mask = padded([sequence[:-3] for sequence in sequences])
    cache = model.new_cache(9)
    model(ids, cache, mask)
    for step in (-3, -2, -1):
        new = torch.stack([sequence[step] for sequence in sequences])[:, None]
        logits = model(new, cache).logits
        for row, sequence in zip(logits, sequences, strict=True):
            assert relative_error(row[0], model(sequence[None]).logits[0, step]) <= 1e-5


@torch.no_grad()
def test_several_new_tokens_after_a_padded_prompt_equal_no_padding() -> None:
    model = small_model(2)
    sequences = [random_ids(seed, length) for seed, length in enumerate((9, 6))]
    ids, mask = padded([sequence[:-3] for sequence in sequences])
    cache = model.new_cache(9)
    model(ids, cache, mask)
    logits = model(torch.stack([sequence[-3:] for sequence in sequences]), cache).logits
    for row, sequence in zip(logits, sequences, strict=True):
        assert relative_error(row, model(sequence[None]).logits[0, -3:]) <= 1e-5


@torch.no_grad()
def test_padding_is_in_no_load() -> None:
    model = small_model(0)
    sequences = [random_ids(seed, length) for seed, length in enumerate((7, 3))]
    ids, mask = padded(sequences)
    alone = sum(load(model(sequence[None]).routings[0]) for sequence in sequences)
    assert torch.equal(load(model(ids, mask=mask).routings[0]), alone)


@torch.no_grad()
@every_attention
@given(seed=st.integers(0, 1000), place=st.integers(1, 7))
def test_a_later_token_never_changes_an_earlier_logit(attention: str, seed: int, place: int) -> None:
    model = small_model(0, attention)
    ids = random_ids(seed, 1, 8)
    changed = ids.clone()
    changed[0, place:] = (changed[0, place:] + 1) % 19
    one, other = model(ids).logits, model(changed).logits
    assert relative_error(one[:, :place], other[:, :place]) <= 1e-5
    assert not torch.allclose(one[:, place], other[:, place])


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = small_model(0)
    ids = random_ids(0, 3, 6)
    together = model(ids).logits
    for row, sequence in zip(together, ids, strict=True):
        assert relative_error(row, model(sequence[None]).logits[0]) <= 1e-5
