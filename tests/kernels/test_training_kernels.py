"""The compiled loops of training equal their plain twins, on every instruction set that the machine has."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.kernels import adamw as optimizer
from moekit.kernels import attention
from moekit.kernels.adamw import Move, Rule, adamw, adamw_twin
from moekit.kernels.cross_entropy import cross_entropy_, cross_entropy_twin_
from moekit.kernels.library import library
from moekit.kernels.norm import norm, norm_backward, norm_backward_twin, norm_twin

seeds = st.integers(0, 2**31 - 1)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
levels = pytest.mark.parametrize("level", [0, 1, 2])
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def error(found: Tensor, expected: Tensor) -> float:
    """The distance as a share of the expected length."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def randoms(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source) for shape in shapes]


def moves(seed: int, sizes: list[int], dtype: torch.dtype, number: int, copies: bool) -> list[Move]:
    found = []
    for index, size in enumerate(sizes):
        parameter, mean, square, gradient = randoms(seed + index, *[(size,)] * 4)
        copy = torch.zeros(size, dtype=torch.bfloat16) if copies else None
        rates = (number + index, 0.01 * (index + 1), 0.1 * index)
        found.append(Move(parameter, 0.01 * mean, 1e-4 * square.square(), (gradient * 1e-2).to(dtype), *rates, copy))
    return found


@levels
@dtypes
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    sizes=st.lists(st.sampled_from([1, 15, 33, 2**14, 2**15 + 5]), min_size=1, max_size=3),
    number=st.integers(1, 2000),
    copies=st.booleans(),
    factor=st.sampled_from([1.0, 0.3]),
)
def test_adamw_moves_as_torch_does(
    dtype: torch.dtype, seed: int, sizes: list[int], number: int, copies: bool, factor: float
) -> None:
    ours, theirs = (moves(seed, sizes, dtype, number, copies) for _ in range(2))
    before = [move.parameter.clone() for move in ours]
    rule = Rule(0.9, 0.95, 1e-10, factor)
    adamw(ours, rule)
    adamw_twin(theirs, rule)
    for one, other, start in zip(ours, theirs, before, strict=True):
        assert error(one.mean, other.mean) < 1e-6
        assert error(one.square, other.square) < 1e-6
        # A parameter's last bit is large beside a small move.
        assert error(one.parameter - start, other.parameter - start) < 1e-5 + 1e-7 / other.lr
        if one.rounded is not None:
            assert torch.equal(one.rounded, one.parameter.bfloat16())


@pytest.mark.skipif(library() is None, reason="no compiled kernels here")
def test_numbers_that_are_not_finite_stay_so() -> None:
    (move,) = moves(0, [40], torch.float32, 1, copies=True)
    move.gradient[3], move.gradient[35] = torch.nan, torch.inf
    adamw([move], Rule(0.9, 0.95, 1e-10))
    assert move.rounded is not None
    assert move.parameter.isnan().nonzero().flatten().tolist() == [3, 35]
    assert torch.equal(move.rounded.isnan(), move.parameter.isnan())
    assert torch.tensor(optimizer.norm([move.gradient])).isnan()


@levels
@dtypes
@pytest.mark.usefixtures("at_level")
@given(seed=seeds, sizes=st.lists(st.sampled_from([1, 31, 70, 2**14 + 1]), max_size=4))
def test_the_norm_of_gradients_is_that_of_torch(dtype: torch.dtype, seed: int, sizes: list[int]) -> None:
    gradients = [x.to(dtype) for x in randoms(seed, *((size,) for size in sizes))]
    assert optimizer.norm(gradients) == pytest.approx(optimizer.norm_twin(gradients), rel=1e-6)


@levels
@dtypes
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from([1, 8, 31, 64, 100])),
    zeros=st.booleans(),
)
def test_root_mean_square_norm_and_its_gradient_equal_their_twins(
    dtype: torch.dtype, seed: int, shape: tuple[int, int, int], zeros: bool
) -> None:
    x, weight, grad = (t.to(dtype) for t in randoms(seed, shape, shape[-1:], shape))
    if zeros:
        weight[::3] = 0
    found, expected = norm(x, weight, 1e-6), norm_twin(x.double(), weight.double(), 1e-6)
    assert expected.unit is not None
    assert error(found.y, expected.y) < ROUNDING[dtype]
    assert error(found.scale, expected.scale) < ROUNDING[dtype]
    mine = norm_backward(found, weight, grad)
    theirs = norm_backward_twin(expected.unit, weight.double(), expected.scale, grad.double())
    longest = max(float(t.norm()) for t in theirs) + float((grad * weight).norm() * found.scale.max())
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm()) < ROUNDING[dtype] * longest


@levels
@dtypes
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds, rows=st.integers(1, 9), classes=st.sampled_from([1, 2, 31, 64, 301]), size=st.sampled_from([0, 1, 60])
)
def test_cross_entropy_and_its_gradient_equal_their_twins(
    dtype: torch.dtype, seed: int, rows: int, classes: int, size: float
) -> None:
    logits = size * randoms(seed, (rows, classes))[0].to(dtype)
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    mine, theirs, kept = logits.clone(), logits.double(), logits.clone()
    losses = cross_entropy_(mine, targets, gradient=True)
    expected = F.cross_entropy(theirs, targets, reduction="none")
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)
    slopes = theirs.softmax(dim=-1).scatter_add(-1, targets[:, None], torch.full((rows, 1), -1.0).double())
    assert float((mine.double() - slopes).abs().max()) < ROUNDING[dtype]
    assert torch.equal(cross_entropy_(kept, targets, gradient=False), losses)
    assert torch.equal(kept, logits)
    twin = logits.clone()
    torch.testing.assert_close(cross_entropy_twin_(twin, targets, gradient=True), losses, rtol=1e-5, atol=1e-5)
    assert float((twin.double() - slopes).abs().max()) < ROUNDING[dtype]


@pytest.mark.skipif(library() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_shows_in_the_loss(value: float) -> None:
    logits = torch.zeros(2, 70)
    logits[1, 66] = value
    losses = cross_entropy_(logits, torch.tensor([3, 3]), gradient=True)
    assert losses.isfinite().tolist() == [True, False]
    assert not logits[1].isfinite().all()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    future = torch.full((q.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
    return (q @ k.mT * scale + future).softmax(dim=-1) @ v


def heads(seed: int, shape: tuple[int, int, int], widths: tuple[int, int], strided: bool) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, in one of the two orders that layers have them in."""
    batch, n_heads, length = shape
    order = (batch, length, n_heads) if strided else shape
    found = randoms(seed, *[(*order, widths[0])] * 2, *[(*order, widths[1])] * 2)
    return [(x.transpose(1, 2) if strided else x).bfloat16() for x in found]


@pytest.mark.parametrize("level", [2])
@pytest.mark.usefixtures("at_level")
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([2, 16, 63, 64, 65, 130, 200])),
    widths=st.tuples(st.sampled_from([2, 7, 32, 96]), st.sampled_from([1, 16, 24, 64, 80, 130])),
    strided=st.booleans(),
    scale=st.sampled_from([0.02, 0.3, 3.0]),
)
def test_attention_and_its_gradients_equal_the_plain_formula(
    seed: int, shape: tuple[int, int, int], widths: tuple[int, int], strided: bool, scale: float
) -> None:
    q, k, v, grad = heads(seed, shape, widths, strided)
    assert attention.runs_here(q, k, v)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = plain_attention(wide[0], wide[1], wide[2], scale)
    theirs = torch.autograd.grad(exact, wide, grad.double())
    found = attention.attend(q, k, v, scale)
    assert error(found.out, exact) < 2**-7
    mine = attention.attend_backward(q, k, v, *found, grad, scale)
    longest = max(float(one.norm()) for one in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert float((one.double() - other).norm()) < 2**-6 * longest


@pytest.mark.parametrize("level", [2])
@pytest.mark.usefixtures("at_level")
@given(seed=seeds, first=st.integers(0, 99), length=st.sampled_from([100, 129]))
def test_attention_does_not_look_ahead(seed: int, first: int, length: int) -> None:
    q, k, v, _ = heads(seed, (1, 2, length), (8, 8), strided=False)
    before = attention.attend(q, k, v, 0.5).out[:, :, : first + 1]
    for x in (q, k, v):
        x[:, :, first + 1 :] = 1000.0
    assert torch.equal(attention.attend(q, k, v, 0.5).out[:, :, : first + 1], before)
