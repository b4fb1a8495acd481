"""Programs take turns, and a median is what counts."""

from collections.abc import Callable

import pytest

from moekit.measure.bench.turns import LIMIT, MOST_STEPS, TRIES, Entrant, Pace, clocked, take_turns


def entrant(name: str, seconds: float, log: list[str], variant: str = "") -> Entrant:
    return Entrant(name, variant, 1.0, lambda: (log.append(name + variant), seconds)[1])


def after_warming_up(log: list[str], tries: int) -> list[str]:
    """The turns, without the tries of all entrants."""
    return log[tries:]


def test_entrants_alternate_in_every_round() -> None:
    log: list[str] = []
    take_turns([entrant("a", 0.3, log), entrant("b", 0.3, log), entrant(LIMIT, 0.3, log)], Pace(3, 0.0))
    assert after_warming_up(log, 3 * TRIES) == ["a", "b", LIMIT] * 3


def test_quick_work_is_repeated_within_a_turn_up_to_a_bound() -> None:
    log: list[str] = []
    take_turns([entrant("a", 0.1, log), entrant("b", 0.3, log), entrant("c", 1e-7, log)], Pace(2, 0.4))
    assert after_warming_up(log, 3 * TRIES) == (["a"] * 4 + ["b"] + ["c"] * MOST_STEPS) * 2


def test_heavy_work_warms_up_once() -> None:
    log: list[str] = []
    take_turns([entrant("a", 5.0, log)], Pace(2, 0.4))
    assert log == ["a"] * 3


def of_seconds(*seconds: float) -> Callable[[], float]:
    waiting = iter(seconds)
    return lambda: next(waiting)


def test_the_median_counts_and_warming_up_does_not() -> None:
    (timing,) = take_turns([Entrant("a", "", 6.0, of_seconds(5.0, 0.1, 0.7, 0.2))], Pace(3, 0.0))
    assert timing[:4] == ("a", "", 6.0, 0.2)


def test_the_spread_is_the_range_of_the_middle_half() -> None:
    seconds = [5.0, 4.0, 1.0, 2.0, 3.0]
    (timing,) = take_turns([Entrant("a", "", 6.0, of_seconds(9.0, *seconds))], Pace(5, 0.0))
    assert timing.seconds == 3.0
    assert timing.spread == (4.0 - 2.0) / 3.0
    (alone,) = take_turns([Entrant("a", "", 6.0, of_seconds(9.0, 4.0))], Pace(1, 0.0))
    assert alone.spread == 0.0


def test_a_variant_far_behind_its_programs_best_takes_no_turns() -> None:
    log: list[str] = []
    slow = Entrant("b", "2", 1.0, of_seconds(0.5, 0.45, 0.6))
    entrants = [entrant("a", 5.0, log), slow, entrant("b", 0.29, log, "1"), entrant("c", 9.0, log)]
    found = take_turns(entrants, Pace(3, 0.0))
    assert after_warming_up(log, 1 + TRIES + 1) == ["a", "b1", "c"] * 3
    assert [timing.seconds for timing in found] == [5.0, 0.45, 0.29, 9.0]


def test_a_clocked_work_is_done_once() -> None:
    done: list[int] = []
    assert clocked(lambda: done.append(1))() >= 0
    assert done == [1]


@pytest.mark.parametrize("rounds", [1, 4])
def test_as_many_rounds_as_asked(rounds: int) -> None:
    log: list[str] = []
    take_turns([entrant("a", 0.3, log)], Pace(rounds, 0.0))
    assert len(log) == TRIES + rounds
