"""Train, load and save tokenizers.

Ours is a byte-level BPE without a normaliser: every text is covered, and decoding gives back exactly what was encoded.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moekit.config.errors import InputError
from moekit.data.sampling import spread_pieces

END_OF_TEXT = "<|end_of_text|>"
PAD = "<|pad|>"

ENDS = (
    END_OF_TEXT,
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "</s>",
    "<|eos|>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "<EOS>",
)
"""Names under which tokenizers know the token that ends a document, the most specific first."""

FILE = "tokenizer.json"

SAMPLE_BYTES = 6_000_000
"""Enough text for a few thousand merges; a larger sample takes longer and changes little."""

_JAPANESE = r"\p{Han}\p{Hiragana}\p{Katakana}ー々〆"

# Pieces within which bytes are merged. Each run is bounded, for training on pieces of any length would be slow.
# On the demo corpus `_` within words, words joined to the punctuation before them, and line ends joined to the
# indentation after them each save tokens.
PIECES = "|".join(
    (
        rf"[{_JAPANESE}]{{1,12}}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}_&&[^{_JAPANESE}]]{{1,40}}(?:'[a-z]{{1,2}}(?!\p{{L}}))?",
        r"\p{N}{1,3}",
        rf" ?[^\s\p{{L}}\p{{N}}]{{1,80}}(?:[\r\n][ \t\r\n]{{0,80}}| [\p{{L}}_&&[^{_JAPANESE}]]{{1,40}})?",
        r"[\r\n][ \t\r\n]{0,80}",
        r"\s{1,80}(?!\S)",
        r"\s{1,80}",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, learned from `sample_bytes` taken evenly from the texts."""
    specials = [END_OF_TEXT, PAD]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fewest = len(specials) + len(alphabet)
    if vocab_size < fewest:
        raise InputError(
            f"`model.vocab_size`: {vocab_size} is too small", f"a tokenizer over bytes needs at least {fewest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(spread_pieces(texts, sample_bytes), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a folder that has one; it neither pads nor truncates."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file}: no such file", f"name a {FILE}, or a folder with one")
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{file}: is not a tokenizer of the tokenizers library ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `transformers.AutoTokenizer.from_pretrained(folder)` needs to give the same ids."""
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.id_to_token(end_of_text(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end if tokenizer.token_to_id(PAD) is None else PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends a document, under whichever name this tokenizer has it."""
    for name in ENDS:
        token = tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise InputError("the tokenizer has no token that ends a text", f"it needs one of {', '.join(ENDS)}")


def size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is what a model's vocabulary must hold."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
