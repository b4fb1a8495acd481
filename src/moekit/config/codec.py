"""Configurations to and from plain data: one path for TOML, JSON and command-line overrides.

A tagged union is a table with `kind`; a tuple of tagged unions is a table keyed by kind (`balance.bias.rate`);
a tuple of plain dataclasses is a list of tables. Every error names the key, with a hint where one is near.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moekit.config.errors import ConfigError

T = TypeVar("T")


def update(base: T, data: Mapping[str, Any]) -> T:
    """A copy of the dataclass `base` with the fields named in `data` replaced, however deep, and validated again."""
    return dataclasses.replace(base, **_decoded(type(base), data, base))  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as dicts, lists and scalars; what is none is left out. `update` reads it back."""
    return {
        field.name: _encode(value)
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None
    }


def to_toml(config: Any) -> str:
    """The dataclass as TOML text."""
    return "\n".join(_toml_lines(to_dict(config), ())).strip() + "\n"


def overrides(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Command-line pairs such as ("model.moe.top-k", "4") as one nested table, so that they are validated together.

    `balance none` followed by `balance.bias.rate 0.01` empties the section before filling it.
    """
    table: dict[str, Any] = {}
    for key, text in pairs:
        *sections, last = key.split(".")
        place: dict[str, Any] = table
        for depth, section in enumerate(sections, 1):
            found = place.get(section, {})
            inner: Any = {"none": True} if found == "none" else _literal(found)
            if not isinstance(inner, dict):
                raise ConfigError(".".join(sections[:depth]), f"{inner!r} is not a section")
            place[section] = place = inner
        place[last] = text
    return table


def _decode(kind: Any, value: Any, base: Any) -> Any:
    """`value` as the type `kind`; `base` is what it replaces or is merged into. Errors carry the key below this one."""
    members = _members(kind)
    if value == "none" and NoneType in members:
        return None
    may_be_empty = NoneType in members or isinstance(base, tuple)
    if may_be_empty and isinstance(value, Mapping) and value.get("none") is True:
        value = {key: inner for key, inner in value.items() if key != "none"}
        base = () if isinstance(base, tuple) else None
    members = [member for member in members if member is not NoneType]
    if all(dataclasses.is_dataclass(member) for member in members):
        return _decode_table(members, value, base)
    (member,) = members
    if get_origin(member) is tuple:
        return _decode_tuple(get_args(member)[0], _literal(value), base)
    if get_origin(member) is Literal:
        return _decode_choice(get_args(member), value)
    return _decode_scalar(member, value)


def _decode_table(members: list[Any], value: Any, base: Any) -> Any:
    value = _literal(value)
    if not isinstance(value, Mapping):
        raise ConfigError("", f"{value!r} is not a section")
    chosen = members[0] if len(members) == 1 else _member(members, value, base)
    start = base if type(base) is chosen else _defaults(chosen)
    if isinstance(start, dict):
        return _construct(chosen, value)
    return update(start, value)


def _member(members: list[Any], value: Mapping[str, Any], base: Any) -> Any:
    """The member of the tagged union that `kind` names; without it, that of `base`."""
    by_kind = {_kind(member): member for member in members}
    kind = value.get("kind", _kind(type(base)) if base is not None else next(iter(by_kind)))
    if not isinstance(kind, str) or kind not in by_kind:
        raise ConfigError("kind", f"{kind!r} is not one of {', '.join(map(str, by_kind))}", _near(str(kind), by_kind))
    return by_kind[kind]


def _decode_tuple(item: Any, value: Any, base: tuple[Any, ...]) -> tuple[Any, ...]:
    members = _members(item)
    if value in ("none", []):
        return ()
    if dataclasses.is_dataclass(members[0]) and _kind(members[0]) is not None:
        return _decode_keyed(members, value, base)
    if isinstance(value, Mapping):
        value = _replace_at(value, base)
    if not isinstance(value, list | tuple):
        raise ConfigError("", f"{value!r} is not a list", "write it as [0, 1]")
    decoded = []
    for index, entry in enumerate(value):
        try:
            old = base[index] if index < len(base) and isinstance(entry, Mapping) else None
            decoded.append(entry if type(entry) in members else _decode(item, entry, old))
        except ConfigError as error:
            raise error.inside(str(index)) from None
    return tuple(decoded)


def _replace_at(value: Mapping[str, Any], base: tuple[Any, ...]) -> list[Any]:
    """`sources.0.weight = 2` on the command line arrives as {"0": {"weight": 2}}."""
    entries = list(base)
    for key, entry in value.items():
        if not key.isdigit() or int(key) > len(entries):
            raise ConfigError(key, f"is not a position in this list of {len(base)}")
        entries[int(key) : int(key) + 1] = [entry]
    return entries


def _decode_keyed(members: list[Any], value: Any, base: tuple[Any, ...]) -> tuple[Any, ...]:
    by_kind = {str(_kind(member)): member for member in members}
    if not isinstance(value, Mapping):
        raise ConfigError("", f"{value!r} is not a section", f"its members are {', '.join(by_kind)}")
    entries = {str(_kind(type(entry))): entry for entry in base}
    for key, settings in value.items():
        kind = key.replace("-", "_")
        if kind not in by_kind:
            raise ConfigError(key, "unknown key", _near(kind, by_kind))
        if settings == "none":
            entries.pop(kind, None)
            continue
        try:
            entries[kind] = _decode(by_kind[kind] | None, settings, entries.get(kind))
        except ConfigError as error:
            raise error.inside(kind) from None
    return tuple(entries.values())


def _decode_choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value in choices:
        return value
    listed = ", ".join(map(str, choices))
    raise ConfigError("", f"{value!r} is not one of {listed}", _near(str(value), [str(c) for c in choices]))


def _decode_scalar(kind: type, value: Any) -> Any:
    value = value if kind is str else _literal(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise ConfigError("", f"{value!r} is not {wanted}")
    if kind is float and not math.isfinite(value):
        raise ConfigError("", f"{value} is not a finite number")
    return value


def _literal(value: Any) -> Any:
    """Text from the command line as the TOML value it spells, if it spells one."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _members(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]


def _kind(cls: Any) -> str | None:
    """The tag of a member of a tagged union. A `kind` that takes several values is a field like any other."""
    tag = {field.name: field for field in dataclasses.fields(cls)}.get("kind")
    return tag.default if tag is not None and len(get_args(tag.type)) == 1 else None  # type: ignore[return-value]


def _defaults(cls: Any) -> Any:
    """An instance with every default, or {} where a field has none."""
    required = [f for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    return {} if required else cls()


def _construct(cls: Any, data: Mapping[str, Any]) -> Any:
    """A dataclass that has fields without a default."""
    values = _decoded(cls, data, None)
    for field in dataclasses.fields(cls):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise ConfigError(field.name, "is missing")
    return cls(**values)


def _decoded(cls: Any, data: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """The fields of `cls` that `data` names, each merged into that of `base` where there is one."""
    hints = get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ConfigError(key, "unknown key", _near(name, fields))
        try:
            values[name] = _decode(fields[name], value, None if base is None else getattr(base, name))
        except ConfigError as error:
            raise error.inside(name) from None
    return values


def _near(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"did you mean `{found[0]}`?" if found else f"known: {', '.join(map(str, known))}"


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        if value and dataclasses.is_dataclass(value[0]) and _kind(type(value[0])) is not None:
            return {entry.kind: {k: v for k, v in to_dict(entry).items() if k != "kind"} for entry in value}
        return [_encode(entry) for entry in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def _toml_lines(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not _is_section(value)]
    if path and (lines or not table):
        lines.insert(0, f"\n[{'.'.join(path)}]")
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml_lines(value, (*path, key))
        elif _is_section(value):
            for entry in value:
                lines += [f"\n[[{'.'.join((*path, key))}]]", *_toml_lines(entry, ())]
    return lines


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _toml_value(value: Any) -> str:
    if isinstance(value, float):
        text = repr(value)
        return text if re.search(r"[.e]", text) else text + ".0"
    # JSON leaves the delete character as it is, TOML wants it escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
