"""A number with its name, its unit, the formula it comes from, and the numbers in it."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One result. `key` is its dotted place below the section in JSON; `label` its name for people.

    `formula` says how it is computed in symbols, `numbers` the same with numbers in it. `note` names the convention,
    the assumption or the source.
    """

    key: str
    label: str
    value: float | int | str | bool | None
    unit: str = ""
    formula: str = ""
    numbers: str = ""
    note: str = ""


class Section(NamedTuple):
    """Figures that belong together: a table for people, one object of the JSON."""

    key: str
    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """The value of the figure `key`. Raises KeyError if there is none."""
        for figure in self.figures:
            if figure.key == key:
                return figure.value
        raise KeyError(key)


def as_json(sections: Iterable[Section]) -> dict[str, Any]:
    """The values as nested objects: "stored.total" of the section "parameters" is parameters.stored.total."""
    found: dict[str, Any] = {}
    for section in sections:
        for figure in section.figures:
            *path, last = (section.key, *figure.key.split("."))
            place = found
            for name in path:
                place = place.setdefault(name, {})
            place[last] = figure.value
    return found
