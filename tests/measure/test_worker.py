"""A process that does its work when told to."""

import pytest
from measured_work import dying, failing, growing, unmade

from moekit.measure.worker import Worker


def test_each_turn_does_the_work_once_and_tells_its_seconds() -> None:
    with Worker(growing, (0.02,)) as worker:
        first, second = worker.turn(), worker.turn()
    assert first >= 0.02
    assert second >= 0.04


def test_the_peak_is_that_of_the_process() -> None:
    with Worker(growing, (0.0, 300)) as large, Worker(growing, (0.0, 0)) as small:
        large.turn()
        small.turn()
        assert 290e6 <= large.peak_bytes() - small.peak_bytes() <= 400e6


def test_an_error_in_making_or_doing_the_work_is_told() -> None:
    with pytest.raises(ValueError, match="on purpose"), Worker(unmade, ()):
        pass
    with Worker(failing, ()) as worker, pytest.raises(ValueError, match="on purpose"):
        worker.turn()


def test_the_death_of_the_process_is_told() -> None:
    with Worker(dying, ()) as worker, pytest.raises(RuntimeError, match=r"died \(exit status 9\)"):
        worker.turn()


def test_the_process_ends_with_the_block() -> None:
    with Worker(growing, (0.0,)) as worker:
        process = worker.process
        assert process.is_alive()
    assert not process.is_alive()
