"""The difference of two models' predictions, against the definition written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import UInt16

from moekit.config.errors import InputError
from moekit.evaluate import difference
from moekit.evaluate.difference import LogitDifference, logit_difference
from moekit.model.transformer import Transformer


def other(model: Transformer, seed: int = 3) -> Transformer:
    return Transformer(model.config, generator=torch.Generator().manual_seed(seed))


def test_a_model_does_not_differ_from_itself(model: Transformer, tokens: UInt16[np.ndarray, "61"]) -> None:
    assert logit_difference(model, model, tokens) == LogitDifference(61, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_figures_are_those_of_the_definition(model: Transformer, tokens: UInt16[np.ndarray, "61"]) -> None:
    second = other(model)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)
        a, b = model(ids).logits[0].double(), second(ids).logits[0].double()
    p, q = a.softmax(-1), b.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    found = logit_difference(model, second, tokens)
    expected = (61, (a - b).abs().max(), (a - b).abs().mean(), divergence.mean(), divergence.max())
    assert found[:5] == pytest.approx([float(value) for value in expected], rel=1e-5)
    assert found.agreement == (a.argmax(-1) == b.argmax(-1)).double().mean().item() < 1
    assert found.divergence > 0


def test_the_divergence_is_that_of_a_from_b(model: Transformer, tokens: UInt16[np.ndarray, "61"]) -> None:
    """KL is not symmetric."""
    second = other(model)
    there, back = logit_difference(model, second, tokens), logit_difference(second, model, tokens)
    assert (there.largest, there.agreement) == (back.largest, back.agreement)
    assert there.divergence != pytest.approx(back.divergence, rel=1e-3)


def test_logits_in_parts_are_the_same(
    model: Transformer, tokens: UInt16[np.ndarray, "61"], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logit_difference(model, other(model), tokens)
    monkeypatch.setattr(difference, "LOGITS_AT_ONCE", 1)
    assert logit_difference(model, other(model), tokens) == pytest.approx(whole, rel=1e-5)


def test_windows_do_not_overlap_and_start_anew(
    model: Transformer, tokens: UInt16[np.ndarray, "61"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difference, "WINDOW", 20)
    heard: list[int] = []
    found = logit_difference(model, other(model), tokens, heard.append)
    assert heard == [20, 20, 20, 1]
    parts = [logit_difference(model, other(model), tokens[start : start + 20]) for start in (0, 20, 40, 60)]
    assert found.positions == 61
    assert found.mean == pytest.approx(sum(part.mean * part.positions for part in parts) / 61, rel=1e-6)
    assert found.largest == max(part.largest for part in parts)


def test_windows_are_no_longer_than_the_models_are_made_for(model: Transformer) -> None:
    heard: list[int] = []
    logit_difference(model, model, np.zeros(130, np.uint16), heard.append)
    assert heard == [64, 64, 2]


def test_what_does_not_compare_is_an_error(model: Transformer) -> None:
    smaller = Transformer(replace(model.config, vocab_size=299))
    ids = np.zeros(3, np.int64)
    for a, b, tokens, message in (
        (model, smaller, ids, "vocabularies of 300 and 299"),
        (model, model, ids[:0], "no tokens"),
        (model, model, ids - 1, "token id -1"),
        (model, model, ids + 300, "token id 300"),
    ):
        with pytest.raises(InputError, match=message):
            logit_difference(a, b, tokens)


def test_logits_that_are_not_finite_are_a_failure(model: Transformer, tokens: UInt16[np.ndarray, "61"]) -> None:
    broken = other(model)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="not all finite"):
        logit_difference(model, broken, tokens)
