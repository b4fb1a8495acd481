"""Hold documents out for validation."""

import hashlib
from typing import NamedTuple


class Split(NamedTuple):
    """The documents to learn from, and those to be judged by. No document is in both."""

    train: list[str]
    valid: list[str]


def hold_out(texts: list[str], share: float, limit: int) -> Split:
    """Hold out `share` of the documents, at least one, with at most `limit` bytes of text.

    The documents are chosen by a hash of their content, so that the choice hardly changes when others come or go, and
    copies of a document go the same way. Where none can be held out as a whole, the end of one is.
    """
    ranked = sorted(dict.fromkeys(texts), key=_digest)
    if len(ranked) == 1:
        return _cut(ranked, ranked[0], share, limit)
    wanted = min(max(1, round(share * len(ranked))), len(ranked) - 1)
    held: set[str] = set()
    for text in ranked[:wanted]:
        size = len(text.encode())
        if size <= limit:
            held.add(text)
            limit -= size
    if not held:
        return _cut(texts, ranked[0], share, limit)
    return Split([text for text in texts if text not in held], [text for text in dict.fromkeys(texts) if text in held])


def at_most(texts: list[str], limit: int) -> list[str]:
    """The first documents, of at most `limit` bytes together; where even the first is longer, its beginning."""
    kept, taken = [], 0
    for text in texts:
        taken += len(text.encode())
        if taken > limit:
            break
        kept.append(text)
    return kept or [texts[0].encode()[:limit].decode(errors="ignore") or texts[0][0]]


def _cut(texts: list[str], chosen: str, share: float, limit: int) -> Split:
    """The end of the document `chosen` as validation text, the rest and the other documents for training."""
    tail = chosen[-max(1, round(share * len(chosen))) :]
    tail = tail.encode()[-limit:].decode(errors="ignore") or chosen[-1]
    rest = chosen[: len(chosen) - len(tail)]
    return Split([rest if text == chosen else text for text in texts], [tail])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
