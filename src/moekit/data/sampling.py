"""Take texts evenly from a collection, up to a number of bytes."""

from collections.abc import Iterable


def spread(texts: list[str], limit: int) -> list[str]:
    """Whole texts of at most `limit` bytes together, taken evenly from beginning to end; all of them if they fit."""
    sizes = [len(text.encode()) for text in texts]
    total = sum(sizes)
    if total <= limit:
        return texts
    kept, seen, taken = [], 0, 0
    for text, size in zip(texts, sizes, strict=True):
        seen += size
        if taken + size <= limit * seen / total:
            kept.append(text)
            taken += size
    return kept


def spread_pieces(texts: Iterable[str], limit: int, length: int = 4096) -> list[str]:
    """The same with the texts cut into pieces of `length` characters, so that long ones are not left out."""
    pieces = [text[start : start + length] for text in texts for start in range(0, len(text), length)]
    return spread(pieces, limit) or pieces[:1]
