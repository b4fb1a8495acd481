"""Text in, text out."""

import pytest
import torch
from tokenizers import Tokenizer, processors

from moekit.config.errors import InputError
from moekit.data.tokenizer import END_OF_TEXT
from moekit.generation.sampling import SamplingConfig
from moekit.generation.text import Completions, Stop, complete, encode_prompt, pad_left
from moekit.model.transformer import Transformer

GREEDY = SamplingConfig(temperature=0.0)
NOTHING = Stop()
PROMPTS = ("the quick brown", "fox", "天地を jumps over")


def run(
    model: Transformer, tokenizer: Tokenizer, prompts: tuple[str, ...] = PROMPTS, stop: Stop = NOTHING
) -> Completions:
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return complete(model, tokenizer, ids, 24, GREEDY, stop=stop)


def test_a_batch_gives_the_same_greedy_text_as_each_prompt_alone(model: Transformer, tokenizer: Tokenizer) -> None:
    together = run(model, tokenizer).rows
    alone = [run(model, tokenizer, (prompt,)).rows[0] for prompt in PROMPTS]
    assert list(together) == alone


def test_ids_are_the_prompt_and_what_follows_and_text_is_what_follows(model: Transformer, tokenizer: Tokenizer) -> None:
    for prompt, row in zip(PROMPTS, run(model, tokenizer).rows, strict=True):
        n = len(encode_prompt(tokenizer, prompt))
        assert row.ids[:n] == encode_prompt(tokenizer, prompt)
        assert row.text == tokenizer.decode(row.ids[n:])


def test_pieces_make_up_the_text_of_each_prompt(model: Transformer, tokenizer: Tokenizer) -> None:
    heard = [""] * 3
    ids = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]

    def listen(index: int, piece: str) -> None:
        assert piece
        heard[index] += piece

    rows = complete(model, tokenizer, ids, 24, SamplingConfig(), seed=3, on_text=listen).rows
    assert heard == [row.text for row in rows]


def test_a_stop_string_cuts_the_text_where_it_first_occurs(model: Transformer, tokenizer: Tokenizer) -> None:
    whole = [row.text or "" for row in run(model, tokenizer).rows]
    stop = whole[0][5:8]
    cut = [row.text for row in run(model, tokenizer, stop=Stop(strings=(stop,))).rows]
    assert cut == [text.split(stop)[0] for text in whole]


def test_generation_ends_when_every_text_has_met_its_stop_string(model: Transformer, tokenizer: Tokenizer) -> None:
    whole = run(model, tokenizer, PROMPTS[:1]).rows[0]
    stop = Stop(strings=((whole.text or "")[:2],))
    row = run(model, tokenizer, PROMPTS[:1], stop).rows[0]
    assert row.text == ""
    assert len(row.ids) < len(whole.ids)


def test_a_stop_id_ends_its_row_and_shows_in_the_ids_only(model: Transformer, tokenizer: Tokenizer) -> None:
    prompt = encode_prompt(tokenizer, PROMPTS[0])
    new = run(model, tokenizer, PROMPTS[:1]).rows[0].ids[len(prompt) :]
    first = new.index(new[6])
    row = run(model, tokenizer, PROMPTS, Stop(ids=(new[6],))).rows[0]
    assert row.ids == prompt + new[: first + 1]
    assert row.text == tokenizer.decode(new[:first])


def test_without_a_tokenizer_there_are_ids_and_no_text(model: Transformer) -> None:
    (row,) = complete(model, None, [[1, 2]], 3, GREEDY).rows
    assert len(row.ids) == 5 and row.text is None
    with pytest.raises(InputError, match="need a tokenizer"):
        complete(model, None, [[1, 2]], 3, GREEDY, stop=Stop(strings=("a",)))


def test_an_empty_prompt_begins_a_new_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert encode_prompt(tokenizer, "") == [end]
    assert encode_prompt(tokenizer, "fox")[0] != end


def test_what_the_tokenizer_puts_before_a_text_stands_before_a_prompt(tokenizer: Tokenizer) -> None:
    beginning = Tokenizer.from_str(tokenizer.to_str())
    beginning.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    assert encode_prompt(beginning, "") == [1]
    assert encode_prompt(beginning, "fox") == [1, *tokenizer.encode("fox").ids]


def test_prompts_are_padded_on_the_left_and_equal_ones_not_at_all() -> None:
    ids, mask = pad_left([[5], [6, 7, 8]])
    assert mask is not None
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert pad_left([[1, 2], [3, 4]]).mask is None


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_a_prompt_without_tokens_is_an_error(prompts: list[list[int]]) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        pad_left(prompts)


def test_ids_of_a_padded_batch_are_checked_too(model: Transformer) -> None:
    with pytest.raises(InputError, match="outside"):
        complete(model, None, [[1, 2], [300]], 3, GREEDY)


def test_bfloat16_generates(tokenizer: Tokenizer, model: Transformer) -> None:
    half = Transformer(model.config, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert len(run(half, tokenizer).rows) == 3
