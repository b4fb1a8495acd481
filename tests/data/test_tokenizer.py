"""Tokenizers lose nothing, are the same each time, and open in transformers."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from moekit.config.errors import InputError
from moekit.data.tokenizer import END_OF_TEXT, PAD, end_of_text, load_tokenizer, save_tokenizer, size, train_tokenizer

TRAINING = """
import sys
from moekit.data.tokenizer import train_tokenizer
print(train_tokenizer([f"word{n % 7} and {n % 5} 神天地 " * 9 for n in range(99)], 320).to_str())
"""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@given(text=st.text())
def test_decoding_gives_back_what_was_encoded(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False) == text


@given(text=st.text(alphabet=" \t\r\n.,'_aé1神か、", max_size=300))
def test_no_mixture_of_spaces_and_scripts_is_lost(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_special_tokens_come_first_and_all_ids_fit(tokenizer):
    assert [tokenizer.token_to_id(name) for name in (END_OF_TEXT, PAD)] == [0, 1]
    assert size(tokenizer) == tokenizer.get_vocab_size() == 320


def test_every_byte_has_a_token_even_if_training_never_saw_it():
    tokenizer = train_tokenizer(["a"], 300)
    assert size(tokenizer) == 258
    assert tokenizer.decode(encode(tokenizer, "žluťoučký 🐎\x00")) == "žluťoučký 🐎\x00"


def test_training_twice_gives_the_same_tokenizer():
    runs = [subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout


def test_indentation_and_long_runs_without_spaces_are_cut_into_bounded_pieces(tokenizer):
    def pieces(text):
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("if x:\n        return") == ["if", "Ġx", ":Ċ" + 8 * "Ġ", "return"]
    for text in ("神" * 1000, "か" * 1000, "x" * 1000, "=" * 1000, " " * 1000, "7" * 1000, "\n" * 1000):
        assert len(pieces(text)) >= 1000 // 81


def test_a_large_corpus_is_sampled_evenly():
    texts = ["a b " * 5000, "c d " * 5000, "e f " * 5000]
    vocabulary = train_tokenizer(texts, 300, sample_bytes=20_000).get_vocab()
    assert {"Ġa", "Ġd", "Ġf"} <= vocabulary.keys()


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(InputError, match="200"):
        train_tokenizer(["a"], 200)


def test_a_saved_tokenizer_is_the_same_in_transformers_and_here(tokenizer, story, tmp_path):
    from transformers import AutoTokenizer  # noqa: PLC0415  # slow

    save_tokenizer(tokenizer, tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = load_tokenizer(tmp_path / "model")
    text = story(1) + "def f(x):\n\n    return x , don't  神の、\t12345" + END_OF_TEXT
    assert theirs(text)["input_ids"] == theirs.encode(text) == encode(ours, text) == encode(tokenizer, text)
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    assert len(theirs) == 320
    assert ours.to_str() == tokenizer.to_str()


def test_a_tokenizer_loads_from_its_file_or_folder_and_neither_pads_nor_truncates(tokenizer, tmp_path):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.enable_truncation(3)
    copy.enable_padding(length=9)
    copy.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert encode(load_tokenizer(path), "the quick brown fox jumps") == encode(
            tokenizer, "the quick brown fox jumps"
        )


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 1}', "\ud800"])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<|im_end|>"])
def test_the_end_of_text_is_found_under_its_usual_names(name):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, name: 1}, unk_token="a"))
    assert end_of_text(tokenizer) == 1


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(InputError, match="ends a text"):
        end_of_text(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_a_tokenizer_without_our_padding_pads_with_its_end_of_text(tmp_path):
    save_tokenizer(Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")), tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == settings["eos_token"] == "</s>"
