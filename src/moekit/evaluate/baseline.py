"""What general compressors make of a text: the bits per byte that a language model should beat."""

import gzip
import lzma


def compressed_bits_per_byte(text: str) -> dict[str, float]:
    """Bits per UTF-8 byte of `gzip -9` and `xz -9`, headers included; nothing for the empty text."""
    data = text.encode()
    if not data:
        return {}
    compressed = {"gzip": gzip.compress(data, 9, mtime=0), "xz": lzma.compress(data, preset=9)}
    return {name: 8 * len(content) / len(data) for name, content in compressed.items()}
