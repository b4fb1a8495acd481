"""Sampling does what Hugging Face's logits processors do, and what its options say."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers.generation import logits_process as hf

from moekit.config.errors import InputError
from moekit.generation.sampling import (
    SamplingConfig,
    best,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
    penalise,
)

SEEDS = st.integers(0, 10_000)
SHARES = st.floats(0.01, 0.99)


def random_logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * scale


def random_history(seed: int) -> Any:
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 60))
def test_top_k_equals_hugging_face(seed: int, k: int) -> None:
    logits = random_logits(seed).round(decimals=0)  # with ties
    theirs = hf.TopKLogitsWarper(top_k=k)(random_history(seed), logits)
    assert torch.equal(keep_top_k(logits, k), theirs)


@given(SEEDS, SHARES)
def test_top_p_equals_hugging_face(seed: int, p: float) -> None:
    logits = random_logits(seed)
    theirs = hf.TopPLogitsWarper(top_p=p)(random_history(seed), logits)
    assert torch.equal(keep_top_p(logits, p), theirs)


@given(SEEDS, SHARES)
def test_min_p_equals_hugging_face(seed: int, p: float) -> None:
    logits = random_logits(seed)
    theirs = hf.MinPLogitsWarper(min_p=p)(random_history(seed), logits)
    assert torch.equal(keep_min_p(logits, p), theirs)


@given(SEEDS, st.floats(0.5, 2.0))
def test_repetition_penalty_equals_hugging_face(seed: int, penalty: float) -> None:
    logits, history = random_logits(seed), random_history(seed)
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty=penalty)(history, logits)
    assert torch.equal(penalise(logits, penalty, history), theirs)


@given(SEEDS, st.floats(0.3, 2.0), st.integers(0, 20), SHARES, st.floats(0, 0.5), st.floats(0.5, 2.0))
def test_all_filters_together_draw_what_hugging_face_draws(
    seed: int, temperature: float, k: int, top_p: float, min_p: float, penalty: float
) -> None:
    logits, history = random_logits(seed), random_history(seed)
    processors = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(penalty=penalty),
            hf.TemperatureLogitsWarper(temperature),
            *([hf.TopKLogitsWarper(top_k=k)] if k else []),
            hf.TopPLogitsWarper(top_p=top_p),
            hf.MinPLogitsWarper(min_p=min_p),
        ]
    )
    probabilities = processors(history, logits.clone()).softmax(dim=-1)
    theirs = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(-1)
    config = SamplingConfig(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    ours = next_token(logits, config, history, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ours, theirs)


@given(SEEDS, st.sampled_from([0.0, 1e-30, 1e-6]))
def test_no_temperature_takes_the_best_token(seed: int, temperature: float) -> None:
    logits = random_logits(seed, scale=1e4)
    token = next_token(logits, SamplingConfig(temperature=temperature), random_history(seed))
    assert torch.equal(token, logits.argmax(dim=-1))


@given(SEEDS)
def test_the_strictest_filters_leave_the_best_token(seed: int) -> None:
    logits = random_logits(seed)
    for strict in (SamplingConfig(top_k=1), SamplingConfig(top_p=0.0), SamplingConfig(min_p=1.0)):
        assert torch.equal(next_token(logits, strict, random_history(seed)), logits.argmax(dim=-1))


def test_padding_is_not_penalised() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    history = torch.tensor([[0, 0, 1]])
    mask = torch.tensor([[False, False, True]])
    assert penalise(logits, 2.0, history, mask).tolist() == [[2.0, -4.0, 1.0]]


def test_filters_work_in_float32_whatever_the_dtype_of_the_logits() -> None:
    logits = random_logits(3).bfloat16()
    config = SamplingConfig(top_p=0.9, temperature=0.7)
    both = [
        next_token(x, config, random_history(3), None, torch.Generator().manual_seed(0))
        for x in (logits, logits.float())
    ]
    assert torch.equal(*both)


def test_samples_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().expand(20_000, 3)
    history = torch.zeros(20_000, 1, dtype=torch.long)
    tokens = next_token(logits, SamplingConfig(), history, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens, minlength=3) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"`{field}`"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize("size", [1, 40, 385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(SEEDS)
def test_the_best_token_is_the_first_of_the_greatest(size: int, dtype: torch.dtype, seed: int) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)).round(decimals=0).to(dtype)
    assert torch.equal(best(logits), logits.argmax(dim=-1))
    logits[1, seed % size] = torch.nan
    assert torch.equal(best(logits), logits.argmax(dim=-1))
    assert torch.equal(best(torch.full((2, size), -torch.inf)), torch.zeros(2, dtype=torch.long))
