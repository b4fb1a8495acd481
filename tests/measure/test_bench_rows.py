"""A row holds a figure beside the best peer and the limit."""

import json

import pytest

from moekit.measure.bench.names import ALL, KINDS, named
from moekit.measure.bench.row import Row, Value, as_json, rate_row, time_row
from moekit.measure.bench.turns import LIMIT, OURS, Timing

TIMINGS = [
    Timing("peer", "slow", 10.0, 4.0, 0.1),
    Timing(OURS, "", 10.0, 1.0, 0.1),
    Timing(LIMIT, "memory read", 80.0, 2.0, 0.3),
    Timing("peer", "fast", 10.0, 2.0, 0.0),
]
KEYS = {
    "work", "kind", "label", "unit", "better", "moekit", "peer", "peer_name", "moekit_to_peer", "limit", "limit_name",
    "moekit_to_limit", "peers", "details", "spread",
}  # fmt: skip


def test_a_rate_is_the_amount_in_a_second_beside_the_fastest_peer_and_the_limit() -> None:
    row = rate_row("work", "train", "label", "GB/s", TIMINGS)
    assert row.moekit == 10.0
    assert row.peers == (("peer slow", 2.5), ("peer fast", 5.0))
    assert row.peer == ("peer fast", 5.0)
    assert row.limit == ("memory read", 40.0)
    assert (row.to_peer, row.to_limit) == (2.0, 0.25)
    assert row.spread == {"moekit": 0.1, "peer slow": 0.1, "peer fast": 0.0, "memory read": 0.3}


@pytest.mark.parametrize(("per_second", "unit"), [(1, "s"), (1000, "ms")])
def test_of_times_the_least_is_the_best(per_second: int, unit: str) -> None:
    row = time_row("work", "decode", "label", TIMINGS, per_second)
    assert (row.moekit, row.unit) == (per_second, unit)
    assert row.peer == ("peer fast", 2.0 * per_second)
    assert row.to_peer == 0.5
    assert row.limit is None


def test_a_row_without_peers_has_no_ratio() -> None:
    row = Row("work", "train", "label", "GB", 3.0)
    assert row.peer is row.to_peer is row.to_limit is None


def test_scripts_find_the_same_names_in_every_row() -> None:
    full, bare = rate_row("a", "train", "label", "GB/s", TIMINGS), Row("b", "decode", "label", "s", 3.0, (), None, True)
    for row in (full, bare):
        assert json.loads(json.dumps(as_json(row))).keys() == KEYS
    assert as_json(full)["better"] == "more"
    assert as_json(bare)["better"] == "less"
    assert as_json(full)["peers"] == {"peer slow": 2.5, "peer fast": 5.0}
    assert as_json(bare._replace(peers=(Value("x", 6.0),)))["moekit_to_peer"] == 0.5


def test_works_are_named_one_by_one_by_kind_or_all_and_come_once() -> None:
    assert named(["all"]) == ALL
    assert named(["decode", "layer-decode"]) == KINDS["decode"]
    assert named(["model-train", "layer-train"]) == ("layer-train", "model-train")
    assert named([*KINDS]) == ALL
    with pytest.raises(KeyError, match="layer"):
        named(["layer"])
