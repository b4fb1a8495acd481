"""From sources to a corpus: documents split into training and validation text, and both as tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt
from tokenizers import Tokenizer

from moekit.config.errors import InputError
from moekit.config.run import DataConfig, Source
from moekit.data.cache import cache_key, write_whole
from moekit.data.documents import Skip, read_documents, read_validation
from moekit.data.sampling import spread_pieces
from moekit.data.split import Split, at_most, hold_out
from moekit.data.tokenizer import PIECES, SAMPLE_BYTES, end_of_text, load_tokenizer, size, train_tokenizer

CHUNK = 256
"""Documents encoded at a time: enough for every core, few enough to bound memory."""


class Domain(NamedTuple):
    """One body of text, in tokens; each document ends with the end-of-text token."""

    name: str
    weight: float
    train: UInt[np.ndarray, " N"]
    """memory-mapped"""
    valid: UInt[np.ndarray, " M"]
    """memory-mapped; the tokens of the documents in `valid_text`"""
    valid_text: str
    """held-out documents with a newline between them; bits per byte = nll in bits of `valid` / its UTF-8 bytes"""
    skips: tuple[Skip, ...]
    """what of the source could not be used"""


class Corpus(NamedTuple):
    """What a model reads, and how text becomes tokens."""

    domains: tuple[Domain, ...]
    tokenizer: Tokenizer


class _Texts(NamedTuple):
    source: Source
    split: Split
    skips: tuple[Skip, ...]


def _silent(_: str) -> None:
    pass


def prepare(config: DataConfig, vocab_size: int, cache: Path, notify: Callable[[str], None] = _silent) -> Corpus:
    """Read, split and tokenise every source; `notify` hears what takes a while.

    Tokenizer and tokens are kept in the folder `cache` under names made from the content they come from.
    """
    _check_sources(config.sources)
    texts = []
    for source in config.sources:
        notify(f"reading {source.path}")
        texts.append(_read(source, config, cache))
    tokenizer = _tokenizer(config, texts, vocab_size, cache, notify)
    domains = tuple(_domain(entry, tokenizer, vocab_size, cache, notify) for entry in texts)
    for domain in domains:
        _check_length(domain, config.sequence_length)
    return Corpus(domains, tokenizer)


def _check_sources(sources: tuple[Source, ...]) -> None:
    if not sources:
        raise InputError(
            "`data.sources` is empty: there is nothing to read", "add a [[data.sources]] table with a path"
        )
    names = [source.domain for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two sources have the domain `{name}`",
                "give each source its own domain, or put the files in one folder",
            )


def _read(source: Source, config: DataConfig, cache: Path) -> _Texts:
    documents = read_documents(source, cache)
    if not source.valid:
        return _Texts(source, hold_out(documents.texts, config.valid_share, config.valid_bytes), documents.skips)
    valid = read_validation(source, cache)
    held = at_most(valid.texts, config.valid_bytes)
    known = set(held)
    train = [text for text in documents.texts if text not in known]
    if not train:
        raise InputError(f"{source.path}: all of it is also in {source.valid}", "validate on other text")
    skips = documents.skips + valid.skips
    if repeated := len(documents.texts) - len(train):
        skips += (Skip("also in the validation text", repeated, source.valid),)
    return _Texts(source, Split(train, held), skips)


def _tokenizer(
    config: DataConfig, texts: list[_Texts], vocab_size: int, cache: Path, notify: Callable[[str], None]
) -> Tokenizer:
    if config.tokenizer == "train":
        return _trained(texts, vocab_size, cache, notify)
    tokenizer = load_tokenizer(Path(config.tokenizer).expanduser())
    if size(tokenizer) > vocab_size:
        raise InputError(
            f"{config.tokenizer}: has {size(tokenizer)} tokens, more than model.vocab_size = {vocab_size}",
            f"set model.vocab_size to {size(tokenizer)} or more",
        )
    return tokenizer


def _trained(texts: list[_Texts], vocab_size: int, cache: Path, notify: Callable[[str], None]) -> Tokenizer:
    """A tokenizer learned from the training text, each domain by its weight; or the one learned before."""
    total = sum(entry.source.weight for entry in texts)
    sample = [
        piece
        for entry in texts
        for piece in spread_pieces(entry.split.train, int(SAMPLE_BYTES * entry.source.weight / total))
    ]
    path = cache / f"tokenizer-{cache_key([PIECES, str(vocab_size), *sample])}.json"
    try:
        return load_tokenizer(path)
    except InputError:
        notify(f"training a tokenizer of {vocab_size} tokens")
    tokenizer = train_tokenizer(sample, vocab_size)
    content = tokenizer.to_str().encode()
    write_whole(path, lambda file: file.write(content))
    return tokenizer


def _domain(entry: _Texts, tokenizer: Tokenizer, vocab_size: int, cache: Path, notify: Callable[[str], None]) -> Domain:
    name = entry.source.domain
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    train = _tokens(entry.split.train, tokenizer, dtype, cache, lambda: notify(f"tokenising {name}"))
    valid = _tokens(entry.split.valid, tokenizer, dtype, cache, lambda: None)
    return Domain(name, entry.source.weight, train, valid, "\n".join(entry.split.valid), entry.skips)


def _tokens(
    texts: list[str], tokenizer: Tokenizer, dtype: np.dtype, cache: Path, notify: Callable[[], None]
) -> UInt[np.ndarray, " N"]:
    """The tokens of the texts, memory-mapped from the cache; made where they are missing there or broken."""
    path = cache / f"tokens-{cache_key([tokenizer.to_str(), dtype.name, *texts])}.npy"
    try:
        return _open(path, dtype)
    except Exception:  # numpy raises whatever a broken header leads it to
        notify()
    tokens = encode(texts, tokenizer, dtype)
    write_whole(path, lambda file: np.save(file, tokens))
    return _open(path, dtype)


def _open(path: Path, dtype: np.dtype) -> UInt[np.ndarray, " N"]:
    """The tokens in a cached file; an error if it is missing, shorter or longer than it says, or of another type."""
    tokens = np.lib.format.open_memmap(path, mode="r")
    whole = tokens.offset + tokens.nbytes == path.stat().st_size
    if tokens.dtype != dtype or tokens.ndim != 1 or not whole:
        raise ValueError(f"{path}: is not a list of tokens")
    return tokens


def encode(texts: list[str], tokenizer: Tokenizer, dtype: np.dtype) -> UInt[np.ndarray, " N"]:
    """The tokens of each text followed by the end-of-text token."""
    end = [end_of_text(tokenizer)]
    chunks = [np.array([], dtype=dtype)]
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True  # a document that mentions the end-of-text token must not end there
    try:
        for start in range(0, len(texts), CHUNK):
            encoded = tokenizer.encode_batch_fast(texts[start : start + CHUNK], add_special_tokens=False)
            chunks += [np.array(text.ids + end, dtype=dtype) for text in encoded]
    finally:
        tokenizer.encode_special_tokens = before
    return np.concatenate(chunks)


def _check_length(domain: Domain, sequence_length: int) -> None:
    needed = sequence_length + 2
    if domain.train.size < needed:
        raise InputError(
            f"domain `{domain.name}` has {domain.train.size} training tokens; with data.sequence_length = "
            f"{sequence_length} it needs {needed}",
            "give it more text, or lower data.sequence_length",
        )
