"""Loss, perplexity and bits per byte say the same thing, and the interval covers as often as it claims."""

import gzip
import lzma
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from moekit.config.errors import InputError
from moekit.data.tokenizer import END_OF_TEXT
from moekit.evaluate.baseline import compressed_bits_per_byte
from moekit.evaluate.loss import sequence_nll
from moekit.evaluate.text import evaluate_tokens, half_width, start_id, student
from moekit.model.transformer import Transformer


def test_all_figures_come_from_the_summed_loss(model: Transformer, tokens: np.ndarray) -> None:
    total = sequence_nll(model, tokens, 0, 8, 4).sum()
    found = evaluate_tokens(model, tokens, 200, 0, 8, 4)
    assert found.loss == pytest.approx(total / 61)
    assert found.perplexity == pytest.approx(math.exp(total / 61))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 200)
    assert (found.tokens, found.bytes) == (61, 200)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(model: Transformer, tokens: np.ndarray) -> None:
    weight = model.head.weight.data.clone()
    model.head.weight.data.zero_()
    found = evaluate_tokens(model, tokens, 61, 0, 8, 4)
    model.head.weight.data.copy_(weight)
    assert found.bits_per_byte == pytest.approx(math.log2(300))
    assert found.interval == pytest.approx((math.log2(300),) * 2)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_bits_per_byte_does_not_depend_on_how_windows_are_batched(
    model: Transformer, tokens: np.ndarray, batch: int
) -> None:
    assert evaluate_tokens(model, tokens, 99, 0, 8, 4, batch).bits_per_byte == pytest.approx(
        evaluate_tokens(model, tokens, 99, 0, 8, 4, 3).bits_per_byte, rel=1e-5
    )


def test_the_interval_surrounds_the_value_and_a_short_text_has_none(model: Transformer, tokens: np.ndarray) -> None:
    found = evaluate_tokens(model, tokens, 99, 0, 8, 4)
    assert found.interval is not None
    assert found.interval.low < found.bits_per_byte < found.interval.high
    assert evaluate_tokens(model, tokens, 99, 0, 32, 16).interval is None


def test_the_interval_of_correlated_losses_covers_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        # Runs of 16 tokens are hard or easy together; the true mean is 0.
        hardness = np.repeat(random.normal(size=40), 16)[:630]
        nll = hardness + random.normal(size=630)
        width = half_width(nll, 64)
        assert width is not None
        covered += abs(nll.mean()) < width
    assert 0.90 < covered / 400 < 0.99


@pytest.mark.parametrize(("degrees", "published"), [(4, 2.776), (9, 2.262), (29, 2.045), (100, 1.984), (10**6, 1.960)])
def test_students_quantile_is_that_of_the_tables(degrees: int, published: float) -> None:
    assert student(degrees) == pytest.approx(published, rel=3e-3)


def test_a_text_without_bytes_is_an_error(model: Transformer, tokens: np.ndarray) -> None:
    with pytest.raises(InputError, match="no text"):
        evaluate_tokens(model, tokens, 0, 0, 8, 4)


def test_a_loss_that_is_no_number_is_not_reported(model: Transformer, tokens: np.ndarray) -> None:
    weight = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="nan"):
        evaluate_tokens(model, tokens, 99, 0, 8, 4)
    model.norm.weight.data.copy_(weight)


def test_a_text_begins_after_the_end_of_another_or_after_what_the_tokenizer_puts_there(tokenizer: Tokenizer) -> None:
    assert start_id(tokenizer) == tokenizer.token_to_id(END_OF_TEXT)
    beginning = Tokenizer.from_str(tokenizer.to_str())
    beginning.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    assert start_id(beginning) == 1


def test_compressors_are_those_of_the_command_line() -> None:
    text = "天地を創造 of the heavens and the earth\n" * 50
    data = text.encode()
    assert compressed_bits_per_byte(text) == {
        "gzip": 8 * len(gzip.compress(data, 9, mtime=0)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }
    assert compressed_bits_per_byte("") == {}
