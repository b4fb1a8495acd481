"""The machine's limits as entrants: they take their turns beside the work that they bound."""

import torch

from moekit.measure.bench.turns import LIMIT, Entrant, clocked
from moekit.measure.machine import DTYPES


def dense_product(dtype: str, side: int, per_flop: float = 1e-9) -> Entrant:
    """A product of two square matrices; `per_flop` is the amount of the row's unit that a FLOP does (GFLOP)."""
    torch.manual_seed(0)
    left, right = (torch.randn(side, side).to(DTYPES[dtype]) for _ in range(2))
    turn = clocked(lambda: left @ right)
    return Entrant(LIMIT, f"dense product {dtype}", 2 * side**3 * per_flop, turn)


def reading(n_bytes: int, per_byte: float = 1e-9) -> Entrant:
    """The sum over float32 numbers that fill `n_bytes`; `per_byte` is the amount of the row's unit of a byte (GB)."""
    numbers = torch.ones(n_bytes // 4)
    return Entrant(LIMIT, "memory read", numbers.nbytes * per_byte, clocked(numbers.sum))
