"""One line of the table: a figure of moekit, those of other programs, and the machine's limit."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from moekit.measure.bench.turns import LIMIT, OURS, Timing

Kind = Literal["train", "prefill", "decode"]
NOTHING: Mapping[str, float] = MappingProxyType({})


class Value(NamedTuple):
    """A figure and whose it is."""

    name: str
    value: float


class Row(NamedTuple):
    """Figures of one work in one unit. `work` is the name in scripts, `label` that for readers.

    `peers` holds every variant that was measured. `details` are further figures by name; `spread` tells how unsteady
    the timings were, by the name of whose they are (see `Timing`).
    """

    work: str
    kind: Kind
    label: str
    unit: str
    moekit: float
    peers: tuple[Value, ...] = ()
    limit: Value | None = None
    less_is_better: bool = False
    details: Mapping[str, float] = NOTHING
    spread: Mapping[str, float] = NOTHING

    @property
    def peer(self) -> Value | None:
        """The best of the peers."""
        choose = min if self.less_is_better else max
        return choose(self.peers, key=lambda peer: peer.value, default=None)

    @property
    def to_peer(self) -> float | None:
        """moekit's figure divided by the best peer's."""
        return None if self.peer is None else self.moekit / self.peer.value

    @property
    def to_limit(self) -> float | None:
        """moekit's figure divided by the limit."""
        return None if self.limit is None else self.moekit / self.limit.value


def rate_row(
    work: str,
    kind: Kind,
    label: str,
    unit: str,
    timings: Sequence[Timing],
    details: Mapping[str, float] = NOTHING,
) -> Row:
    """What was done in a second, from the turns of moekit, its peers and the limit."""
    ours, peers, limit = _sorted(timings)
    return Row(
        work,
        kind,
        label,
        unit,
        _rate(ours).value,
        tuple(map(_rate, peers)),
        limit,
        details=details,
        spread=_spread(timings),
    )


def time_row(work: str, kind: Kind, label: str, timings: Sequence[Timing], per_second: int) -> Row:
    """Milliseconds (`per_second` 1000) or seconds (1) of the work; there is no limit."""
    ours, peers, _ = _sorted(timings)
    unit = {1: "s", 1000: "ms"}[per_second]
    others = tuple(Value(peer.name, peer.seconds * per_second) for peer in peers)
    value = ours.seconds * per_second
    return Row(work, kind, label, unit, value, others, less_is_better=True, spread=_spread(timings))


def as_json(row: Row) -> dict[str, Any]:
    """What scripts read; these names stay."""
    peer, limit = row.peer, row.limit
    return {
        "work": row.work,
        "kind": row.kind,
        "label": row.label,
        "unit": row.unit,
        "better": "less" if row.less_is_better else "more",
        "moekit": row.moekit,
        "peer": None if peer is None else peer.value,
        "peer_name": None if peer is None else peer.name,
        "moekit_to_peer": row.to_peer,
        "limit": None if limit is None else limit.value,
        "limit_name": None if limit is None else limit.name,
        "moekit_to_limit": row.to_limit,
        "peers": {each.name: each.value for each in row.peers},
        "details": dict(row.details),
        "spread": dict(row.spread),
    }


def _sorted(timings: Sequence[Timing]) -> tuple[Timing, list[Timing], Value | None]:
    ours = next(timing for timing in timings if timing.program == OURS)
    limits = [_rate(timing) for timing in timings if timing.program == LIMIT]
    peers = [timing for timing in timings if timing.program not in (OURS, LIMIT)]
    return ours, peers, limits[0] if limits else None


def _rate(timing: Timing) -> Value:
    return Value(timing.name, timing.amount / timing.seconds)


def _spread(timings: Sequence[Timing]) -> dict[str, float]:
    return {timing.name: timing.spread for timing in timings}
