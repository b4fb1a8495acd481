"""Compiled logits of a router equal the product in float32, gradients to the rounding of the type."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads_of_torch

from moekit.kernels.library import library
from moekit.kernels.logits import Logits, computes, gradients, product

needs_tiles = pytest.mark.skipif(
    library() is None or library().moekit_level() < 2, reason="no compiled logits on this machine"
)


@needs_tiles
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(1, 600),
    width=st.integers(1, 20),
    experts=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_logits_and_gradients_are_those_of_the_product(
    seed: int, n: int, width: int, experts: int, dtype: torch.dtype
) -> None:
    source = torch.Generator().manual_seed(seed)
    shapes = ((n, 16 * width), (16 * experts, 16 * width))
    x, centroids = (torch.randn(shape, generator=source).to(dtype).requires_grad_() for shape in shapes)
    grad = torch.randn(n, 16 * experts, generator=source)
    assert computes(x, centroids)
    found, expected = Logits.apply(x, centroids), x.double() @ centroids.double().T
    assert found.dtype == torch.float32
    scale = x.detach().double().norm(dim=-1, keepdim=True) * centroids.detach().double().norm(dim=-1)
    assert ((found - expected).abs() <= 1e-6 * scale).all()
    pairs = zip(
        torch.autograd.grad(found, (x, centroids), grad),
        torch.autograd.grad(expected, (x, centroids), grad.double()),
        strict=True,
    )
    for own, other in pairs:
        assert own.dtype == dtype
        assert (own.double() - other.double()).norm() <= (1e-6 if dtype == torch.float32 else 2**-8) * other.norm()


@needs_tiles
def test_other_types_and_widths_are_left_to_torch() -> None:
    x, centroids = torch.zeros(9, 32), torch.zeros(16, 32)
    assert computes(x, centroids)
    assert not computes(x.bfloat16(), centroids)
    assert not computes(x.double(), centroids.double())
    assert not computes(x[:, :24], centroids[:, :24])
    assert not computes(x, centroids[:12])
    assert not computes(x.T.contiguous().T, centroids)


@needs_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    x, centroids = (torch.randn(n, 64, generator=source).to(dtype) for n in (1000, 48))
    grad, found = torch.randn(1000, 48, generator=source).to(dtype), []
    for n in (1, 2, 4):
        with threads_of_torch(n):
            found.append([product(x, centroids), *gradients(x, centroids, grad)])
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))
