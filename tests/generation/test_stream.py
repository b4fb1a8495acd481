"""Streamed text is the whole text, however tokens and pieces cut it."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moekit.config.errors import InputError
from moekit.generation.stream import StopFilter, TokenStream


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = TokenStream(tokenizer, prompt or [])
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@given(st.text(max_size=30))
def test_streamed_text_is_the_text_and_no_piece_is_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_ids_stream_to_what_they_decode_to_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text(max_size=12), st.text(max_size=12))
def test_the_prompt_is_context_and_is_not_given_out(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert "".join(stream(tokenizer, ids, tokenizer.encode(prompt).ids)) == text


@given(st.lists(st.integers(0, 299), max_size=9), st.text(max_size=6))
def test_a_prompt_cut_within_a_character_does_not_spoil_what_follows(
    tokenizer: Tokenizer, prompt: list[int], text: str
) -> None:
    assert "".join(stream(tokenizer, tokenizer.encode("x" + text).ids, prompt)).endswith("x" + text)


def test_the_space_before_a_word_survives_decoders_that_drop_it_at_the_start() -> None:
    vocab = {"<unk>": 0, "▁a": 1, "▁word": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert stream(tokenizer, [2, 1], prompt=[1]) == [" word", " a", ""]
    assert stream(tokenizer, [2, 1]) == ["word", " a", ""]


def cut(text: str, stops: list[str]) -> str:
    """The obvious way: grow the text until it ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


LETTERS = st.text("ab", max_size=12)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    shown, whole = "", cut("".join(pieces), stops)
    for piece in pieces:
        shown += stop_filter.push(piece)
        assert whole.startswith(shown)
    assert shown + stop_filter.finish() == whole
    assert stop_filter.stopped == (whole != "".join(pieces))


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop_filter = StopFilter(["END"])
    assert [stop_filter.push(piece) for piece in ("oneE", "N", "x", "E")] == ["one", "", "ENx", ""]
    assert stop_filter.finish() == "E"


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(InputError, match="stop string is empty"):
        StopFilter(["a", ""])
