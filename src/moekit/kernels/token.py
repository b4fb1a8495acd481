"""One new token of each of a few sequences through blocks of a model, in one compiled call.

Between calls of their own, Python would wait for its memory, which the weights push out of the caches: a quarter of a
millisecond for each layer.
"""

from struct import Struct
from typing import NamedTuple

import torch

from moekit.kernels.library import kernels
from moekit.kernels.one_query import Turn
from moekit.tensors import Float, Int, Tensor

KIND, NORM, CALL = Struct("=q"), Struct("=2Q2qfi"), Struct("=q3Q")
"""Of the job in token.h, what it is, and the norm; and the call."""

JOB_BYTES = 520
ATTENTION, MIXTURE, LAST_NORM, LATENT_ATTENTION = 0, 1, 2, 3


class Rows(NamedTuple):
    """What jobs read and write: the residual stream, the norm of it, and the rotation of the new place."""

    stream: Float[Tensor, "B 1 D"]
    normed: Float[Tensor, "B 1 D"]
    turn: Turn


class Found(NamedTuple):
    """What the `count` mixtures and the last norm of a call find, behind each other as `mixture` says."""

    numbers: Float[Tensor, "count N"]
    places: Int[Tensor, "count T K"]
    states: Float[Tensor, "B 1 D"] | None = None


def job(kind: int, described: bytes) -> bytes:
    """A job as `moekit_job` of token.h lies in memory."""
    return (KIND.pack(kind) + described).ljust(JOB_BYTES, b"\0")


def last_norm(rows: Rows, weight: Float[Tensor, " D"], epsilon: float) -> bytes:
    """The job that norms the residual stream; `weight` is of its type."""
    n, _, width = rows.stream.shape
    narrow = rows.stream.dtype == torch.bfloat16
    return job(LAST_NORM, NORM.pack(rows.stream.data_ptr(), weight.data_ptr(), n, width, epsilon, narrow))


def run(jobs: bytes, found: Found | None = None, past: int = 0, first: int = 0) -> int:
    """Do the jobs from `first` on, with `past` tokens before the new one; returns how many of all are done.

    Where not all are, the next one's mixture has chosen an expert that is not in memory. What the jobs point to must
    live until then. Without `found`, jobs know themselves where they put what they find.
    """
    compiled = kernels()
    found_at = (0, 0, 0) if found is None else [0 if each is None else each.data_ptr() for each in found]
    call = CALL.pack(past, *found_at)
    threads, level = torch.get_num_threads(), compiled.moekit_level()
    return compiled.moekit_token(jobs, len(jobs) // JOB_BYTES, first, call, threads, level)
