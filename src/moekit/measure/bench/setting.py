"""What a benchmark is run with."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moekit.measure.bench.shapes import Sizes
from moekit.measure.bench.turns import Pace


class Setting(NamedTuple):
    """The shapes, how often entrants take turns, the names of the peers that take part, and a folder for large files
    that is removed at the end. `say` hears remarks."""

    sizes: Sizes
    pace: Pace
    peers: frozenset[str]
    folder: Path
    say: Callable[[str], None]


FULL = Pace(rounds=5, seconds=0.25)
QUICK = Pace(rounds=2, seconds=0.0)
