"""The vocabulary in the file is the tokenizer's, and llama.cpp decodes as it does."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import random_model, small
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moekit.checkpoint.gguf import write_gguf
from moekit.config.errors import InputError
from moekit.data.tokenizer import END_OF_TEXT, PAD, size, train_tokenizer

reader = pytest.importorskip("gguf.gguf_reader")

TEXTS = [
    "It's the year 1984: the clocks were striking thirteen .",
    "def route(x):\n    return x @ w_gate  # 12345\n\n",
    "Ünïcode, naïve café; 日本語のテキスト。",
]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {
    "gpt-2": (),
    "qwen2": (WORDS + r"\p{N}" + REST,),
    "llama-bpe": (WORDS + r"\p{N}{1,3}" + REST,),
    "deepseek-llm": (
        "[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓ]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",  # noqa: RUF001
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ),
}
"""The patterns of released tokenizers by llama.cpp's name, the longest class of letters cut short; GPT-2 has none."""


def by_rule(name: str) -> Tokenizer:
    """A byte-level BPE that splits as the released tokenizers do."""
    patterns = RULES[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    splits = [
        pre_tokenizers.Digits(individual_digits=True)
        if (name, pattern) == ("deepseek-llm", r"\p{N}")
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def written(path: Path, tokenizer: Tokenizer | None, ends: tuple[int, ...] = (), spare: int = 5) -> list[str]:
    config = small(vocab_size=spare + (60 if tokenizer is None else size(tokenizer)))
    return write_gguf(config, random_model(config, 0).state_dict().__getitem__, path, "float16", tokenizer, ends)


def field(path: Path, key: str) -> Any:
    return reader.GGUFReader(path).fields[f"tokenizer.ggml.{key}"].contents()


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 380)


def test_texts_types_and_merges_are_the_tokenizers(own: Tokenizer, tmp_path: Path) -> None:
    own.add_tokens([AddedToken("<user>", special=False)])
    path = tmp_path / "model.gguf"
    written(path, own)
    tokens, types = field(path, "tokens"), field(path, "token_type")
    assert tokens[: size(own)] == [own.id_to_token(number) for number in range(size(own))]
    assert tokens[size(own) :] == [f"[PAD{number}]" for number in range(size(own), size(own) + 5)]
    kinds = {END_OF_TEXT: 3, PAD: 3, "<user>": 4, "a": 1, f"[PAD{size(own)}]": 5}
    assert {token: types[tokens.index(token)] for token in kinds} == kinds
    assert field(path, "eos_token_id") == own.token_to_id(END_OF_TEXT)
    assert field(path, "padding_token_id") == own.token_to_id(PAD)
    assert not field(path, "add_bos_token")


def test_llama_cpp_decodes_ids_as_the_tokenizer_does(own: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    oracle = pytest.importorskip("llama_oracle")
    written(tmp_path / "model.gguf", own)
    theirs = oracle.vocabulary(tmp_path / "model.gguf")
    for text in TEXTS:
        ids = own.encode(text).ids
        assert theirs.detokenize(ids).decode("utf-8") == text
        assert theirs.detokenize(theirs.tokenize(text.encode("utf-8"), add_bos=False)).decode("utf-8") == text
    assert theirs.token_eos() == own.token_to_id(END_OF_TEXT)


def test_a_rule_that_llama_cpp_lacks_is_said(own: Tokenizer, tmp_path: Path) -> None:
    assert any("another rule" in note for note in written(tmp_path / "model.gguf", own))


@pytest.mark.parametrize("name", RULES)
def test_under_a_rule_it_knows_llama_cpp_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    oracle = pytest.importorskip("llama_oracle")
    tokenizer, path = by_rule(name), tmp_path / "model.gguf"
    assert written(path, tokenizer) == []
    assert field(path, "pre") == name
    theirs = oracle.vocabulary(path)
    for text in TEXTS:
        assert theirs.tokenize(text.encode("utf-8"), add_bos=False) == tokenizer.encode(text).ids


def test_a_normaliser_makes_the_rule_another(tmp_path: Path) -> None:
    tokenizer = by_rule("gpt-2")
    tokenizer.normalizer = normalizers.Lowercase()
    assert any("another rule" in note for note in written(tmp_path / "lower.gguf", tokenizer))
    tokenizer.normalizer = normalizers.NFC()
    assert written(tmp_path / "composed.gguf", tokenizer) == []


def test_whole_words_before_merges_make_the_rule_another(tmp_path: Path) -> None:
    contents = json.loads(by_rule("qwen2").to_str())
    contents["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    assert any("another rule" in note for note in written(tmp_path / "model.gguf", tokenizer))


def test_ends_are_those_given(own: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    notes = written(path, own, (7, 8, 9, 10))
    assert [field(path, f"{key}_token_id") for key in ("eos", "eot", "eom")] == [7, 8, 9]
    assert any("[10]" in note for note in notes)
    with pytest.raises(InputError, match="outside"):
        written(tmp_path / "other.gguf", own, (size(own) + 5,))


def test_a_tokenizer_without_an_end_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.decoder = decoders.ByteLevel()
    assert any("no token ends" in note for note in written(tmp_path / "model.gguf", tokenizer, spare=20))


def test_more_ids_than_the_model_has_are_an_input_error(own: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size"):
        written(tmp_path / "model.gguf", own, spare=-1)
    assert list(tmp_path.iterdir()) == []


def of_pieces(metaspace: bool) -> Tokenizer:
    """As Llama's: pieces of marked text, every way to make a piece a merge, and bytes for all else."""
    learned = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    learned.train_from_iterator(["\u2581" + text.replace(" ", "\u2581") for text in TEXTS[:2] * 3], trainer)
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    space = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("metaspace", [False, True])
def test_pieces_with_bytes_give_the_same_ids_and_texts(metaspace: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    oracle = pytest.importorskip("llama_oracle")
    tokenizer, path = of_pieces(metaspace), tmp_path / "model.gguf"
    assert written(path, tokenizer) == []
    theirs = oracle.vocabulary(path)
    assert theirs.token_eos() == tokenizer.token_to_id("</s>")
    for text in [*TEXTS, "the the  clock", "x", "emoji 🦉 and\ttab"]:
        ids = tokenizer.encode(text).ids
        assert theirs.tokenize(text.encode("utf-8"), add_bos=False) == ids
        assert theirs.detokenize(ids).decode("utf-8").removeprefix(" ") == tokenizer.decode(ids)


def test_better_merges_have_higher_scores(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    oracle = pytest.importorskip("llama_oracle")
    names = ["<unk>", "</s>", "<0x0A>", "\u2581", "a", "b", "c", "ab", "bc"]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    assert written(tmp_path / "model.gguf", tokenizer) == []
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    assert oracle.vocabulary(tmp_path / "model.gguf").tokenize(b"abc", add_bos=False) == tokenizer.encode("abc").ids


def test_a_text_starts_as_the_tokenizer_starts_it(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    oracle = pytest.importorskip("llama_oracle")
    tokenizer = of_pieces(metaspace=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    written(tmp_path / "model.gguf", tokenizer)
    theirs = oracle.vocabulary(tmp_path / "model.gguf")
    assert theirs.token_bos() == 1
    assert theirs.tokenize(b"the clock", add_bos=True) == tokenizer.encode("the clock").ids
    assert field(tmp_path / "model.gguf", "add_bos_token")
    assert not field(tmp_path / "model.gguf", "add_eos_token")


INEXPRESSIBLE = {
    "a way to make a piece is no merge": [("a", "b"), ("b", "c"), ("ab", "c")],
    "another merge between the ways": [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")],
}


@pytest.mark.parametrize("merges", INEXPRESSIBLE.values(), ids=INEXPRESSIBLE)
def test_merges_that_scores_cannot_express_are_said(merges: list[tuple[str, str]], tmp_path: Path) -> None:
    names = ["<unk>", "</s>", "<0x0A>", "\u2581", "a", "b", "c", "ab", "bc", "abc"]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    assert any("another rule" in note for note in written(tmp_path / "model.gguf", tokenizer))


def test_another_kind_of_tokenizer_is_left_out_and_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    notes = written(tmp_path / "model.gguf", tokenizer)
    assert any("this kind" in note for note in notes)
    assert field(tmp_path / "model.gguf", "model") == "none"


def test_no_tokenizer_is_said(tmp_path: Path) -> None:
    assert any("no tokenizer" in note for note in written(tmp_path / "model.gguf", None))
