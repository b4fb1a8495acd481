"""Sizes and counts as people type them: 64GB, 14.8T."""

import math
import re

from moekit.config.errors import InputError

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def count(option: str, text: str) -> int:
    """A number of tokens: 4096, 500M, 14.8T. Errors name the option."""
    return _parsed(option, text, COUNTS, "a count", "for example 4096, 500M or 14.8T")


def size(option: str, text: str) -> int:
    """Bytes: 64GB, 1.5TiB. Errors name the option."""
    return _parsed(option, text, SIZES, "a size", "for example 64GB or 1.5TB")


def _parsed(option: str, text: str, units: dict[str, int], what: str, hint: str) -> int:
    found = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?) ?([A-Z]*)", text.strip().upper(), flags=re.ASCII)
    if found is None or found[2] not in units:
        raise InputError(f"{option} {text}: is not {what}", hint)
    # Tenths of a unit are exact in whole numbers: 14.8T is not 14.8 * 1e12.
    whole, _, fraction = found[1].partition(".")
    value = int(whole + fraction) * units[found[2]] // 10 ** len(fraction)
    if not 0 < value <= 10**18:
        raise InputError(f"{option} {text}: must be above 0 and at most 1e18", hint)
    return value


def rate(option: str, value: float) -> float:
    """Bytes/s from GB/s. Errors name the option."""
    if not (math.isfinite(value) and 0 < value <= 1e6):
        raise InputError(f"{option} {value:g}: must be a number of GB/s above 0")
    return value * 1e9
