"""A corpus says what it holds, holds what it says, and survives a broken cache."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moekit.config.errors import InputError
from moekit.config.run import DataConfig, Source
from moekit.data.cache import default_cache, write_whole
from moekit.data.corpus import Corpus, encode, prepare
from moekit.data.tokenizer import END_OF_TEXT, end_of_text, save_tokenizer


def config(*paths: Path, **settings) -> DataConfig:
    sources = tuple(Source(path=str(path), domain=f"d{index}") for index, path in enumerate(paths))
    return DataConfig(**{"sources": sources, "sequence_length": 16, **settings})


def texts_of(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    decoded = corpus.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    return decoded.split(END_OF_TEXT)


def test_training_and_validation_tokens_are_the_documents_each_with_its_end(folder, tmp_path, story):
    corpus = prepare(config(folder, valid_share=0.1), 400, tmp_path / "cache")
    (domain,) = corpus.domains
    train, valid = texts_of(corpus, domain.train), texts_of(corpus, domain.valid)
    assert train[-1] == valid[-1] == ""
    assert len(valid) == 1 + 4
    assert "\n".join(valid[:-1]) == domain.valid_text
    assert sorted(train[:-1] + valid[:-1]) == sorted(story(seed) for seed in range(40))
    assert domain.train.dtype == np.uint16 and isinstance(domain.train, np.memmap)


def test_a_large_vocabulary_takes_four_bytes(folder, tmp_path):
    (domain,) = prepare(config(folder), 70_000, tmp_path / "cache").domains
    assert domain.train.dtype == domain.valid.dtype == np.uint32


def test_the_second_preparation_comes_from_the_cache_and_is_the_same(folder, tmp_path):
    heard: list[str] = []
    first = prepare(config(folder), 400, tmp_path / "cache", heard.append)
    assert heard == [f"reading {folder}", "training a tokenizer of 400 tokens", "tokenising d0"]
    heard.clear()
    second = prepare(config(folder), 400, tmp_path / "cache", heard.append)
    assert heard == [f"reading {folder}"]
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    assert np.array_equal(second.domains[0].train, first.domains[0].train)


def test_changed_text_is_tokenised_anew(folder, tmp_path, story):
    before = prepare(config(folder), 400, tmp_path / "cache").domains[0].train.size
    (folder / "zz.txt").write_text(story(99, 500))
    assert prepare(config(folder), 400, tmp_path / "cache").domains[0].train.size > before


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_cache_is_rebuilt(folder, tmp_path, data):
    cache = tmp_path / "cache"
    whole = prepare(config(folder), 400, cache).domains[0]
    expected = (np.array(whole.train), np.array(whole.valid))
    path = data.draw(st.sampled_from(sorted(cache.iterdir())))
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    path.unlink()  # in place, the memory maps above would change with it
    path.write_bytes(data.draw(st.sampled_from([content[:cut], content + b"x", b"\0" * len(content), b"PK\3\4"])))
    again = prepare(config(folder), 400, cache).domains[0]
    assert np.array_equal(again.train, expected[0]) and np.array_equal(again.valid, expected[1])


def test_preparing_at_the_same_time_gives_the_same(folder, tmp_path):
    found: list[Corpus] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(config(folder), 400, tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(corpus.domains[0].train, found[0].domains[0].train) for corpus in found)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.npy", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cache: the cache cannot be written") as error:
        prepare(config(folder), 400, tmp_path / "cache")
    assert "MOEKIT_CACHE" in error.value.hint


def test_the_tokenizer_learns_nothing_from_validation_text(folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name}{name} " * 500)
    one, two = (
        prepare(DataConfig(sources=(Source(path=str(folder), valid=str(tmp_path / f"{name}.txt")),)), 500, tmp_path)
        for name in ("one", "two")
    )
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    assert one.domains[0].valid_text == "oneone " * 500
    assert np.array_equal(one.domains[0].train, two.domains[0].train)


def test_what_is_in_the_validation_file_is_not_trained_on(folder, tmp_path):
    copy = tmp_path / "valid.txt"
    copy.write_text((folder / "07.txt").read_text(encoding="utf-8"), encoding="utf-8")
    (domain,) = prepare(config(sources=(Source(path=str(folder), valid=str(copy)),)), 400, tmp_path / "cache").domains
    assert [(skip.reason, skip.count) for skip in domain.skips] == [("also in the validation text", 1)]
    with pytest.raises(InputError, match="all of it is also in"):
        prepare(config(sources=(Source(path=str(copy), valid=str(copy)),)), 400, tmp_path / "cache")


def test_a_document_that_mentions_the_end_of_text_does_not_end_there(tokenizer):
    end = end_of_text(tokenizer)
    tokens = encode([f"the {END_OF_TEXT} fox", "a"], tokenizer, np.dtype(np.uint16))
    assert (tokens == end).sum() == 2 and tokens[-1] == end
    assert tokenizer.encode(END_OF_TEXT).ids == [end]


def test_a_given_tokenizer_is_used_as_it_is(tokenizer, folder, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "model")
    corpus = prepare(config(folder, tokenizer=str(tmp_path / "model")), 1000, tmp_path / "cache")
    assert corpus.tokenizer.to_str() == tokenizer.to_str()
    with pytest.raises(InputError, match=r"has 320 tokens, more than model\.vocab_size = 319"):
        prepare(config(folder, tokenizer=str(tmp_path / "model")), 319, tmp_path / "cache")


def test_weights_skips_and_names_reach_the_domains(folder, tmp_path):
    (folder / "a.bin").write_bytes(b"\0")
    source = Source(path=str(folder), domain="mine", weight=2.5)
    (domain,) = prepare(DataConfig(sources=(source,), sequence_length=16), 400, tmp_path / "cache").domains
    assert (domain.name, domain.weight) == ("mine", 2.5)
    assert [(skip.reason, skip.count) for skip in domain.skips] == [("binary file", 1)]


def test_too_little_text_says_how_much_is_there_and_how_much_is_needed(tmp_path):
    (tmp_path / "a.txt").write_text("short text")
    with pytest.raises(InputError, match=r"`d0` has \d+ training tokens; .* = 16 it needs 18"):
        prepare(config(tmp_path / "a.txt"), 400, tmp_path / "cache")


def test_no_sources_and_doubled_domains_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"`data\.sources` is empty"):
        prepare(DataConfig(), 400, tmp_path)
    source = Source(path=str(folder))
    with pytest.raises(InputError, match="two sources have the domain `text`"):
        prepare(DataConfig(sources=(source, source)), 400, tmp_path)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MOEKIT_CACHE", raising=False)
    assert default_cache() == tmp_path / ".cache" / "moekit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "moekit"
    monkeypatch.setenv("MOEKIT_CACHE", "~/own")
    assert default_cache() == tmp_path / "own"
