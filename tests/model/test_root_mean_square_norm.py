"""RMSNorm and its hand-written gradient."""

import pytest
import torch

from moekit.model.norm import RMSNorm
from oracle.attention import rms_norm
from oracle.compare import relative_error

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random_norm(dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(7, 1e-5)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_each_row_is_divided_by_its_root_mean_square(dtype: torch.dtype, size: float) -> None:
    norm = random_norm(dtype)
    x = (size * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1))).to(dtype)
    weight = norm.weight.detach().double()
    expected = torch.stack([rms_norm(row, weight, 1e-5) for row in x.double().view(-1, 7)]).view(2, 3, 7)
    y = norm(x)
    assert y.dtype == dtype
    assert relative_error(y.detach(), expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_the_gradient_equals_a_finite_difference(shape: tuple[int, ...]) -> None:
    norm = random_norm(torch.float64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))


def test_the_gradient_in_bfloat16_is_right_to_its_rounding() -> None:
    norm = random_norm(torch.bfloat16)
    x = torch.randn(200, 7, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    direction = torch.randn(200, 7, generator=torch.Generator().manual_seed(2)).bfloat16()
    mine = torch.autograd.grad(norm(x), (x, norm.weight), direction)
    wide_x, wide_norm = x.detach().double().requires_grad_(), random_norm(torch.bfloat16).double()
    exact = torch.autograd.grad(wide_norm(wide_x), (wide_x, wide_norm.weight), direction.double())
    for one, other in zip(mine, exact, strict=True):
        assert relative_error(one, other) <= 2**-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (5000, 7), (0, 7)])
def test_without_gradients_rows_are_normed_alike(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm, generator = random_norm(dtype), torch.Generator().manual_seed(1)
    x, added = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    with torch.enable_grad():
        expected, expected_of_sum = norm(x).detach(), norm(x + added).detach()
    assert torch.equal(norm(x), expected)
    total, of_sum = norm.of_sum(x, added)
    assert torch.equal(total, x + added)
    assert torch.equal(of_sum, expected_of_sum)
