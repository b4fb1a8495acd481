"""The fields of a configuration with their values and help, which is the text below each field in its class."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from moekit.config.codec import to_dict


class FieldHelp(NamedTuple):
    """One field: its dotted key, its value here, and what it is."""

    key: str
    value: str
    text: str


def describe(config: Any, prefix: str = "") -> Iterator[FieldHelp]:
    """Every field of the dataclass `config`, however deep."""
    helps = field_helps(type(config))
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{key}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, entry in enumerate(value):
                yield from describe(entry, f"{key}.{getattr(entry, 'kind', index)}.")
        else:
            # The tag of a variant is explained by the variant itself.
            text = (type(config).__doc__ or "").splitlines()[0] if field.name == "kind" else ""
            yield FieldHelp(key, _shown(value), helps.get(field.name, text))


def field_helps(cls: type) -> dict[str, str]:
    """The string that follows each field of a class in its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    helps = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and documented:
            helps[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return helps


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return str([to_dict(entry) if dataclasses.is_dataclass(entry) else entry for entry in value])
    return str(value).lower() if isinstance(value, bool) else str(value)
