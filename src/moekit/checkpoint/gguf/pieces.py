"""Vocabularies of pieces with bytes to fall back on (SentencePiece), as those of Llama and Mixtral."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

SPACE = "\u2581"

LOWEST = -1e9
"""The score of a piece that no merge makes."""

Contents = Mapping[str, Any]
"""What a `tokenizer.json` holds."""


def falls_back_on_bytes(contents: Contents) -> bool:
    """Whether the tokenizer is of this kind."""
    model = contents["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback")) and "<0x0A>" in model["vocab"]


def piece_fields(contents: Contents, tokens: list[str]) -> dict[str, Any]:
    """The score of each token and the space before a text.

    A `tokenizer.json` lists merges, the best first; llama.cpp joins any two neighbours that make a piece, the one with
    the highest score first.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merged_pairs(contents)):
        ranks.setdefault(left + right, rank)
    return {
        "tokenizer.ggml.scores": [float(-ranks[token]) if token in ranks else LOWEST for token in tokens],
        "tokenizer.ggml.add_space_prefix": _steps(contents)[:1] == ["prepend"],
    }


def merged_pairs(contents: Contents) -> list[tuple[str, str]]:
    """The merges in order. Older files hold the two halves as one string."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in contents["model"]["merges"])
    return [(left, right) for left, right in pairs]


def scores_suffice(contents: Contents) -> bool:
    """Whether scores give the same tokens as the merges: all ways to make a piece are merges, one after the other."""
    if _steps(contents) not in (["prepend", "replace"], ["replace"]):
        return False
    vocabulary, pairs = contents["model"]["vocab"], merged_pairs(contents)
    made = [left + right for left, right in pairs]
    blocks = 1 + sum(before != after for before, after in pairwise(made))
    known = set(pairs)
    return blocks == len(set(made)) and all(
        (piece[:cut], piece[cut:]) in known
        for piece in set(made)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    )


def _steps(contents: Contents) -> list[str]:
    """What happens to a text before it is cut into pieces; llama.cpp can put a space before it and mark spaces."""
    return [*_normalised(contents.get("normalizer")), *_split(contents.get("pre_tokenizer"))]


def _normalised(step: Mapping[str, Any] | None) -> list[str]:
    match step:
        case None:
            return []
        case {"type": "Sequence", "normalizers": steps}:
            return [name for each in steps for name in _normalised(each)]
        case {"type": "Prepend", "prepend": prepended} if prepended == SPACE:
            return ["prepend"]
        case {"type": "Replace", "pattern": {"String": " "}, "content": content} if content == SPACE:
            return ["replace"]
    return ["unknown"]


def _split(step: Mapping[str, Any] | None) -> list[str]:
    match step:
        case None:
            return []
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": False} if mark == SPACE:
            return ["replace"] if scheme == "never" else ["prepend", "replace"]
    return ["unknown"]
