"""By which of llama.cpp's named rules (`tokenizer.ggml.pre`) it splits text as a given tokenizer does."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"

_GPT2 = "bytes with the rule of GPT-2"
_CASED = "cased letters"
_DIGIT = "one digit"

KNOWN = {
    (_GPT2,): "gpt-2",
    (_WORDS + r"\p{N}{1,3}" + _AFTER_DIGITS,): "llama-bpe",
    (_WORDS + r"\p{N}" + _AFTER_DIGITS,): "qwen2",
    ("[\r\n]", _CASED, "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$",
     "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", _DIGIT): "deepseek-llm",
    (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
     r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
     "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"): "deepseek-v3",
}  # fmt: skip
"""The patterns of a `tokenizer.json`, in order, and llama.cpp's name for them. Expressions from the released files."""

NEAREST = "gpt-4o"
"""For other rules: of llama.cpp's, it gives a tokenizer of moekit's own the most tokens in common (84 to 94 of 100 in
prose, code and Japanese), and text decoded under it keeps its white space."""


class Rule(NamedTuple):
    """llama.cpp's name of a rule, and whether it is the tokenizer's own."""

    name: str
    exact: bool


def splitting_rule(tokenizer: Mapping[str, Any]) -> Rule:
    """The rule for a tokenizer given as the contents of its `tokenizer.json`."""
    name = KNOWN.get(tuple(_patterns(tokenizer.get("pre_tokenizer") or {})))
    # llama.cpp takes whole words before it merges under this rule, and under it alone.
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    if name is None or whole_words != (name == "llama-bpe") or not _keeps_text(tokenizer.get("normalizer")):
        return Rule(name or NEAREST, exact=False)
    return Rule(name, exact=True)


def _keeps_text(normalizer: Mapping[str, Any] | None) -> bool:
    """llama.cpp normalises nothing; its converter neglects NFC, which most text is in."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(map(_keeps_text, normalizer["normalizers"]))


def _patterns(step: Mapping[str, Any]) -> list[str]:
    """The expressions that split text one after the other; one that matches no rule where a step is unknown."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [pattern for each in steps for pattern in _patterns(each)]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            # Copies of this long class differ in how Unicode normalised them.
            return [_CASED if pattern.startswith(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ") else pattern]
        case {"type": "Digits", "individual_digits": True}:
            return [_DIGIT]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return [_GPT2] if use_regex else []
    return ["unknown"]
