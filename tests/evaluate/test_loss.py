"""Every token is predicted once, from the context that the windows promise."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from moekit.config.errors import InputError
from moekit.evaluate import loss
from moekit.evaluate.loss import sequence_nll, windows
from moekit.model.transformer import Transformer

START = 7
SHAPES = st.integers(1, 20).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length)))


def obvious(model: Transformer, tokens: np.ndarray, length: int, stride: int) -> list[float]:
    """One token at a time, from the first window that reaches it."""
    text = [START, *tokens.tolist()]
    nll = []
    for place, token in enumerate(tokens.tolist()):
        begin = 0
        while place >= begin + length:
            begin += stride
        with torch.no_grad():
            logits = model(torch.tensor([text[begin : place + 1]])).logits[0, -1]
        nll.append(-float(logits.double().log_softmax(dim=-1)[token]))
    return nll


@given(st.integers(1, 80), SHAPES)
def test_each_token_is_counted_once_with_the_promised_context(n_tokens: int, shape: tuple[int, int]) -> None:
    length, stride = shape
    counts = np.zeros(n_tokens, int)
    for begin, counted, end in windows(n_tokens, length, stride):
        assert end - begin <= length
        assert begin == 0 or counted - begin >= length - stride
        counts[counted:end] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize(("length", "stride"), [(61, 61), (100, 10), (16, 16), (16, 8), (16, 5), (16, 1), (1, 1)])
def test_nll_equals_predicting_one_token_at_a_time(
    model: Transformer, tokens: np.ndarray, length: int, stride: int
) -> None:
    nll = sequence_nll(model, tokens, START, length, stride, batch=3)
    np.testing.assert_allclose(nll, obvious(model, tokens, length, stride), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("n_tokens", [1, 2, 16, 17, 24, 25, 32])
def test_texts_of_any_length_are_predicted_whole(model: Transformer, tokens: np.ndarray, n_tokens: int) -> None:
    nll = sequence_nll(model, tokens[:n_tokens], START, 16, 8)
    np.testing.assert_allclose(nll, obvious(model, tokens[:n_tokens], 16, 8), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_nll_does_not_depend_on_how_windows_are_batched(model: Transformer, tokens: np.ndarray, batch: int) -> None:
    one, other = (sequence_nll(model, tokens, START, 10, 4, batch=size) for size in (3, batch))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_nll_does_not_depend_on_how_many_logits_exist_at_once(
    model: Transformer, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sequence_nll(model, tokens, START, 16, 8)
    rows: list[int] = []
    hook = model.head.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * 300)
    parts = sequence_nll(model, tokens, START, 16, 8)
    hook.remove()
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)
    assert max(rows) == 4


def test_the_listener_hears_of_every_token(model: Transformer, tokens: np.ndarray) -> None:
    heard: list[int] = []
    sequence_nll(model, tokens, START, 16, 8, batch=2, on_tokens=heard.append)
    assert sum(heard) == len(tokens) and len(heard) > 2


def test_the_model_is_left_in_the_mode_it_was_in(model: Transformer, tokens: np.ndarray) -> None:
    model.train()
    model.layers[1].eval()
    sequence_nll(model, tokens, START, 16, 8)
    assert model.training and not model.layers[1].training
    model.train()


@pytest.mark.parametrize(
    ("length", "stride", "batch", "message"),
    [(0, 1, 1, "`sequence_length`"), (8, 0, 1, "`stride`"), (8, 9, 1, "`stride`: 9 exceeds"), (8, 8, 0, "`batch`")],
)
def test_a_window_that_cannot_be_is_an_error(
    model: Transformer, tokens: np.ndarray, length: int, stride: int, batch: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sequence_nll(model, tokens, START, length, stride, batch)


def test_no_tokens_and_tokens_outside_the_vocabulary_are_errors(model: Transformer) -> None:
    with pytest.raises(InputError, match="no tokens"):
        sequence_nll(model, np.array([], np.int64), START, 8, 8)
    with pytest.raises(InputError, match="token id 300 is outside"):
        sequence_nll(model, np.array([1, 300]), START, 8, 8)
    with pytest.raises(InputError, match="token id 300 is outside"):
        sequence_nll(model, np.array([1, 2]), 300, 8, 8)
