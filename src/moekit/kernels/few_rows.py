"""Products with bfloat16 or quantised matrices: few rows read each once, at the speed of memory; many go in tiles."""

import ctypes
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moekit.kernels.groups import numbers_in, restore
from moekit.kernels.library import library
from moekit.kernels.packed import Matrix, Packed, product
from moekit.tensors import Float, Int, Tensor

MATRIX, BLOCK = Struct("=Qqqqii"), Struct("=QqqqiiQqqqiiQQq")
"""How `moekit_matrix` and `moekit_block` lie in memory (rows.h)."""

NARROW = torch.bfloat16


class Expert(NamedTuple):
    """One SwiGLU block and the rows that come to it: which token each is, and with which weight.

    The matrices are [2F, D] (gate rows, then up rows) and [D, F].
    """

    gate_up: Matrix
    down: Matrix
    tokens: Int[Tensor, " R"]
    weights: Float[Tensor, " R"]


Place = tuple[int, int, int, int, int, int]
"""Where a matrix lies: address, rows, numbers in a row, bytes from row to row, bits (16: bfloat16), size of groups."""


def runs_here() -> bool:
    """Whether compiled kernels are there; the functions below compute the same without, slowly."""
    return library() is not None


def linear(x: Float[Tensor, "T I"], matrix: Matrix, dtype: torch.dtype = torch.float32) -> Float[Tensor, "T O"]:
    """x W^T in `dtype`, rounded once. With a grouped matrix x is rounded to 8 bits in groups, too."""
    compiled = library()
    if compiled is None:
        return linear_twin(x, matrix).to(dtype)
    x, n, place, narrow = _readable(x), x.shape[0], placed(matrix), dtype == NARROW
    y = torch.empty(n, place[1], dtype=dtype if narrow else torch.float32)
    source, threads, level = x.data_ptr(), torch.get_num_threads(), compiled.moekit_level()
    described, narrow_x = MATRIX.pack(*place), x.dtype == NARROW
    compiled.moekit_linear_rows(described, source, narrow_x, n, y.data_ptr(), narrow, threads, level)
    return y if narrow else y.to(dtype)


def swiglu(
    x: Float[Tensor, "T D"], experts: Sequence[Expert], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "T D"]:
    """The weighted sum, for each token, of the experts to which it comes, in `dtype` and one parallel region."""
    compiled = library()
    if compiled is None:
        return swiglu_twin(x, experts).to(dtype)
    # What the addresses point into must live until the call returns.
    kept = [(_side_by_side(e.tokens, torch.int64), _side_by_side(e.weights, torch.float32)) for e in experts]
    blocks = [
        BLOCK.pack(*placed(e.gate_up), *placed(e.down), tokens.data_ptr(), weights.data_ptr(), len(tokens))
        for e, (tokens, weights) in zip(experts, kept, strict=True)
    ]
    return _swiglu(compiled, x, blocks, dtype)


def placed(matrix: Matrix) -> Place:
    """Where a matrix lies, or the first of a stack."""
    assert not isinstance(matrix, Packed)
    if isinstance(matrix, Tensor):
        *_, out, inputs = matrix.shape
        return matrix.data_ptr(), out, inputs, matrix.stride(-2) * 2, 16, 0
    return placed_bytes(*matrix)


def placed_bytes(rows: Tensor, bits: int, group: int) -> Place:
    """As `placed`, of a grouped matrix in parts."""
    *_, out, length = rows.shape
    return rows.data_ptr(), out, numbers_in(length, bits, group), rows.stride(-2), bits, group


def linear_twin(x: Float[Tensor, "T I"], matrix: Matrix) -> Float[Tensor, "T O"]:
    """As `linear`, in plain torch."""
    if isinstance(matrix, Packed):
        if matrix.takes(len(x)):
            return product(x, matrix)
        matrix = matrix.source
    if isinstance(matrix, Tensor):
        return F.linear(x.bfloat16().float(), matrix.float())
    return F.linear(rounded(x, matrix.group), restore(matrix))


def swiglu_twin(x: Float[Tensor, "T D"], experts: Sequence[Expert]) -> Float[Tensor, "T D"]:
    """As `swiglu`, in plain torch."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for gate_up, down, tokens, weights in experts:
        gate, up = linear_twin(x[tokens].float(), gate_up).chunk(2, dim=-1)
        out.index_add_(0, tokens, weights.float().unsqueeze(-1) * linear_twin(F.silu(gate) * up, down))
    return out


def rounded(x: Float[Tensor, "T I"], group: int) -> Float[Tensor, "T I"]:
    """`x` as whole numbers from -127 to 127 times a step for each group, the largest magnitude / 127."""
    groups = x.float().unflatten(-1, (-1, group))
    step = groups.abs().amax(dim=-1, keepdim=True) / 127
    return ((groups * (1 / step).nan_to_num(posinf=0)).round() * step).flatten(-2)


def _side_by_side(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers if numbers.dtype == dtype and numbers.is_contiguous() else numbers.to(dtype).contiguous()


def _readable(x: Tensor) -> Tensor:
    """`x` as compiled code reads it: bfloat16 or float32, row after row."""
    return (x if x.dtype == NARROW else x.float()).contiguous()


def _swiglu(compiled: ctypes.CDLL, x: Tensor, blocks: list[bytes], dtype: torch.dtype) -> Tensor:
    x, (n, width), narrow = _readable(x), x.shape, dtype == NARROW
    y = torch.empty(n, width, dtype=dtype if narrow else torch.float32)
    source, threads, level = x.data_ptr(), torch.get_num_threads(), compiled.moekit_level()
    described, count, narrow_x = b"".join(blocks), len(blocks), x.dtype == NARROW
    compiled.moekit_swiglu_rows(described, count, source, narrow_x, n, width, y.data_ptr(), narrow, threads, level)
    return y if narrow else y.to(dtype)
