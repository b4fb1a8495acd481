"""Rotary positions in `config.json`: `rope_theta` and `rope_scaling`, or `rope_parameters` which hold both."""

from collections.abc import Mapping
from typing import Any, Literal

from moekit.config.errors import check
from moekit.config.families.hub import HubFields, typed
from moekit.config.model import LinearConfig, Llama3Config, RopeConfig, YarnConfig

LINEAR = {"factor": "factor"}
LLAMA3 = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
FIELDS = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}
"""The hub's names of the fields of each scaling, and ours."""

KINDS = {"original_max_position_embeddings": int, "truncate": bool}
"""Fields that hold something else than a number with a point."""


def read_rope(
    fields: HubFields, layout: Literal["half", "interleaved"], max_positions: int, latent: bool, theta: float = 10000.0
) -> RopeConfig:
    """The positions of a model with latent attention or without; `theta` is the family's where the file has none.

    Raises ConfigError, with the name of the key, for every scaling or field that is not understood.
    """
    fields.ignore("rope_theta", "rope_scaling", "rope_parameters")
    data = fields.data
    old, new = data.get("rope_scaling"), data.get("rope_parameters")
    check(not (old and new) or old == new, "rope_scaling", "differs from rope_parameters")
    key = "rope_scaling" if old else "rope_parameters"
    given = old or new or {}
    check(isinstance(given, dict), key, f"{given!r} is not an object")
    found = {name: value for name, value in given.items() if value is not None}
    inner, outer = found.pop("rope_theta", None), data.get("rope_theta")
    theta = typed(next((value for value in (inner, outer) if value is not None), theta), float, "rope_theta")
    older, newer = found.pop("type", None), found.pop("rope_type", None)
    check(None in (older, newer) or older == newer, f"{key}.rope_type", f"{newer!r} differs from type {older!r}")
    kind = newer or older or "default"
    check(found.pop("partial_rotary_factor", 1) == 1, f"{key}.partial_rotary_factor", "is not supported")
    check(kind == "default" or kind in FIELDS, f"{key}.rope_type", f"{kind!r} is not supported")
    if kind == "default":
        check(not found, f"{key}.{next(iter(found), '')}", "is not understood without a rope_type")
        return RopeConfig(theta=theta, layout=layout)
    scaling = _scaling(kind, _values(found, kind, key), key, max_positions, latent)
    return RopeConfig(theta=theta, layout=layout, scaling=scaling)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields `read_rope` reads, as older and newer readers both understand them."""
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    values = {hub: getattr(scaling, ours) for hub, ours in FIELDS[scaling.kind].items()}
    if values.get("truncate"):
        del values["truncate"]
    kept = {hub: value for hub, value in values.items() if value is not None}
    return {"rope_theta": rope.theta, "rope_scaling": {"type": scaling.kind, "rope_type": scaling.kind, **kept}}


def _values(found: Mapping[str, Any], kind: str, key: str) -> dict[str, Any]:
    """The fields by our names."""
    known = FIELDS[kind]
    unknown = sorted(found.keys() - known.keys())
    check(not unknown, f"{key}.{next(iter(unknown), '')}", "is not understood")
    return {known[hub]: typed(value, KINDS.get(hub, float), f"{key}.{hub}") for hub, value in found.items()}


def _scaling(
    kind: str, values: dict[str, Any], key: str, max_positions: int, latent: bool
) -> YarnConfig | LinearConfig | Llama3Config:
    original = values.get("original_max_positions")
    if kind == "yarn" and "factor" not in values and original:
        values["factor"] = max_positions / original
    check("factor" in values, f"{key}.factor", "is missing from config.json")
    if kind == "linear":
        return LinearConfig(**values)
    values.setdefault("original_max_positions", max_positions)
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            check(name in values, f"{key}.{name}", "is missing from config.json")
        return Llama3Config(**values)
    return YarnConfig(**values | _temperatures(values, key, latent))


def _temperatures(values: dict[str, Any], key: str, latent: bool) -> dict[str, Any]:
    """Without both temperatures, cosines and sines take that of 1, and the softmax none."""
    both = values.get("mscale") and values.get("mscale_all_dim")
    if latent and not both:
        # DeepSeek's own code and transformers read other pairs than these differently.
        neither = not values.get("mscale_all_dim") and values.get("mscale", 1) == 1
        check(neither, f"{key}.mscale", "needs mscale_all_dim, and the other way round; both above 0")
    return {} if both else {"mscale": 1.0, "mscale_all_dim": 0.0}
