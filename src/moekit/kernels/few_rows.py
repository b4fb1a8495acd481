"""Products with bfloat16 or quantised matrices: few rows read each once, at the speed of memory; many go in tiles."""

import ctypes
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moekit.kernels.groups import Grouped, restore
from moekit.kernels.library import library
from moekit.tensors import Float, Int, Tensor

MATRIX, ROWS = Struct("=Qqqqii"), Struct("=QQq")
"""How `moekit_matrix`, and what follows two of them in `moekit_block`, lie in memory (rows.h)."""


class Expert(NamedTuple):
    """One SwiGLU block and the rows that come to it: which token each is, and with which weight.

    The matrices are [2F, D] (gate rows, then up rows) and [D, F], bfloat16 or grouped.
    """

    gate_up: Tensor | Grouped
    down: Tensor | Grouped
    tokens: Int[Tensor, " R"]
    weights: Float[Tensor, " R"]


def runs_here() -> bool:
    """Whether compiled kernels are there; the functions below compute the same without, slowly."""
    return library() is not None


def linear(x: Float[Tensor, "T I"], matrix: Tensor | Grouped) -> Float[Tensor, "T O"]:
    """x W^T in float32. With a grouped matrix x is rounded to 8 bits in groups, too."""
    compiled = library()
    if compiled is None:
        return linear_twin(x, matrix)
    out, source = torch.empty(len(x), _rows(matrix).shape[0]), x.float().contiguous()
    threads, level = torch.get_num_threads(), _level(compiled)
    compiled.moekit_linear(_described(matrix), source.data_ptr(), len(x), out.data_ptr(), threads, level)
    return out


def swiglu(x: Float[Tensor, "T D"], experts: Sequence[Expert]) -> Float[Tensor, "T D"]:
    """The weighted sum, for each token, of the experts to which it comes, in float32 and one parallel region."""
    compiled = library()
    if compiled is None:
        return swiglu_twin(x, experts)
    # What the addresses point into must live until the call returns.
    kept = [(_side_by_side(e.tokens, torch.int64), _side_by_side(e.weights, torch.float32)) for e in experts]
    blocks = b"".join(
        _described(e.gate_up) + _described(e.down) + ROWS.pack(tokens.data_ptr(), weights.data_ptr(), len(tokens))
        for e, (tokens, weights) in zip(experts, kept, strict=True)
    )
    out, source = torch.zeros(x.shape, dtype=torch.float32), x.float().contiguous()
    threads, level = torch.get_num_threads(), _level(compiled)
    compiled.moekit_swiglu(blocks, len(experts), source.data_ptr(), *x.shape, out.data_ptr(), threads, level)
    return out


def linear_twin(x: Float[Tensor, "T I"], matrix: Tensor | Grouped) -> Float[Tensor, "T O"]:
    """As `linear`, in plain torch."""
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


def _rows(matrix: Tensor | Grouped) -> Tensor:
    return matrix.rows if isinstance(matrix, Grouped) else matrix


def _side_by_side(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers if numbers.dtype == dtype and numbers.is_contiguous() else numbers.to(dtype).contiguous()


def _described(matrix: Tensor | Grouped) -> bytes:
    """`moekit_matrix` of rows.h."""
    if isinstance(matrix, Tensor):
        out, inputs = matrix.shape
        return MATRIX.pack(matrix.data_ptr(), out, inputs, matrix.stride(0) * 2, 16, 0)
    rows, bits, group = matrix
    return MATRIX.pack(rows.data_ptr(), rows.shape[0], matrix.inputs, rows.stride(0), bits, group)


def _level(compiled: ctypes.CDLL) -> int:
    return compiled.moekit_level()
