"""A figure's value as people write it: 671.0B, 335.5 GB, 14.2 ms."""

import math
from collections import Counter
from collections.abc import Sequence

from moekit.plan.figure import Figure

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")

LARGE = ((10**12, "T"), (10**9, "B"), (10**6, "M"))

LONGEST = 10**18
"""Whole numbers from here on are shown as a power of ten; JSON has them in full."""

TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s"), (1e-3, "ms"), (1e-6, "\N{MICRO SIGN}s"))


def words(figure: Figure) -> str:
    """The value with its unit; counts in full, with their size in brackets where they are long."""
    value = figure.value
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "without bound"
    return _amount(value, figure.unit)


def _amount(value: float | int, unit: str) -> str:
    if unit == "B":
        return scaled(value, "B", "bytes")
    if unit.startswith("FLOP"):
        return scaled(value, unit, unit)
    return duration(value) if unit == "s" else f"{number(value)} {unit}".rstrip()


def brief(figure: Figure) -> str:
    """The value for a narrow column: long counts by their size alone."""
    value = figure.value
    count = isinstance(value, int) and not isinstance(value, bool) and figure.unit in ("", "tokens", "devices")
    return short(value) if count and abs(value) < LONGEST else words(figure)  # type: ignore[arg-type]


def labelled(figures: Sequence[Figure]) -> list[tuple[str, Figure]]:
    """Each figure with a label of its own: shared ones begin with the first word of the key, or end with all of it."""
    return [(label, figure) for figure, label in zip(figures, _labels(figures), strict=True)]


def _labels(figures: Sequence[Figure]) -> list[str]:
    plain = Counter(figure.label for figure in figures)
    begun = [
        f"{figure.key.partition('.')[0]}: {figure.label}" if plain[figure.label] > 1 else figure.label
        for figure in figures
    ]
    shared = Counter(begun)
    return [
        f"{figure.label} ({figure.key})" if shared[label] > 1 else label
        for figure, label in zip(figures, begun, strict=True)
    ]


def scaled(value: float | int, unit: str, bare: str) -> str:
    """`value` with a decimal prefix before `unit`, as disks and datasheets count; below 1000 in the unit `bare`."""
    if abs(value) < 1000:
        return f"{number(value)} {bare}"
    # Rounded first: 999.96 k is 1.0 M.
    step = min((len(str(round(abs(value)))) - 1) // 3, len(PREFIXES) - 1)
    if step < len(PREFIXES) - 1 and round(abs(value) / 1000**step, 1) >= 1000:
        step += 1
    return f"{value / 1000**step:,.1f} {PREFIXES[step]}{unit}"


def duration(seconds: float | int) -> str:
    """A time in the unit that leaves it above 1."""
    if seconds == 0:
        return "0 s"
    size, unit = next((entry for entry in TIMES if abs(seconds) >= entry[0]), TIMES[-1])
    return f"{number(seconds / size)} {unit}"


def short(value: int) -> str:
    """A count with four digits: 671.0B. Below a million in full."""
    size, letter = next((entry for entry in LARGE if abs(value) >= entry[0]), (1, ""))
    return f"{value / size:,.1f}{letter}" if letter else f"{value:,}"


def number(value: float | int) -> str:
    """Whole numbers in full, others with three or four digits."""
    if isinstance(value, int):
        if abs(value) >= LONGEST:
            return power_of_ten(value)
        return f"{value:,} ({short(value)})" if abs(value) >= LARGE[-1][0] else f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) >= 1e15 or abs(value) < 1e-4:
        return f"{value:.3g}"
    decimals = min(max(2 - math.floor(math.log10(abs(value))), 0), 6)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def power_of_ten(value: int) -> str:
    """A whole number of any length as 4.426e9; Python refuses to write out more than 4300 digits."""
    power = math.floor(math.log10(abs(value)))
    return f"{'-' if value < 0 else ''}{10 ** (math.log10(abs(value)) - power):.3f}e{power}"
