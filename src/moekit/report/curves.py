"""The curves of a run, from the rows of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.report.series import Series, number_of, pick

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """Every series the page draws, in full length."""

    loss: tuple[Series, ...]
    """cross-entropy in nats per token: of the next token, then of the token after it"""
    balance_losses: tuple[Series, ...]
    """the other terms of the objective"""
    validation: tuple[Series, ...]
    """bits per byte of each domain"""
    max_violation: tuple[Series, ...]
    """of each layer, of the load of one step"""
    entropy: tuple[Series, ...]
    dead_experts: tuple[Series, ...]
    lr: Series
    gradient_norm: Series
    tokens_per_s: Series
    tokens: Series


def curves(rows: Rows) -> Curves:
    """All series of a run. What no row has is an empty series or none."""
    terms = _keys(rows, "losses")
    main = pick("next token", rows, "losses", "next_token") if "next_token" in terms else pick("loss", rows, "loss")
    second = [pick("token after next", rows, "losses", "mtp")] if "mtp" in terms else []
    others = [name for name in terms if name not in ("next_token", "mtp")]
    return Curves(
        loss=tuple(series for series in (main, *second) if series.values),
        balance_losses=tuple(pick(name.replace("_", " "), rows, "losses", name) for name in others),
        validation=tuple(pick(name, rows, "validation", name, "bits_per_byte") for name in _keys(rows, "validation")),
        max_violation=_by_layer(rows, "max_violation"),
        entropy=_by_layer(rows, "entropy"),
        dead_experts=_by_layer(rows, "dead_experts"),
        lr=pick("learning rate", rows, "lr"),
        gradient_norm=pick("gradient norm", rows, "gradient_norm"),
        tokens_per_s=pick("tokens per second", rows, "tokens_per_s"),
        tokens=pick("tokens", rows, "tokens"),
    )


def _keys(rows: Rows, name: str) -> list[str]:
    """The keys of a table that some rows hold, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row.get(name) or {}))


def _by_layer(rows: Rows, key: str) -> tuple[Series, ...]:
    """One series for each layer."""
    found: dict[Any, tuple[list[float], list[float]]] = {}
    for index, row in enumerate(rows):
        for entry in row.get("layers") or ():
            if entry.get(key) is not None:
                steps, values = found.setdefault(entry.get("layer"), ([], []))
                steps.append(number_of(row.get("step", index)))
                values.append(number_of(entry[key]))
    return tuple(Series(f"layer {layer}", steps, values) for layer, (steps, values) in found.items())
