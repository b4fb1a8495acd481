"""Several layers' products in one call equal the layers, on every instruction set that the machine has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moekit.config.quantisation import Groups
from moekit.kernels.few_rows import linear_twin
from moekit.kernels.groups import Grouped, quantise
from moekit.kernels.library import library
from moekit.kernels.linear import Linear
from moekit.kernels.products import products

FORMATS = [(16, 0), *((bits, group) for bits in (4, 8) for group in (32, 64, 128))]


def layer(generator: torch.Generator, out: int, width: int, form: tuple[int, int], bias: torch.dtype | None) -> Linear:
    made = Linear(width, out, bias=bias is not None, dtype=torch.bfloat16)
    weight, (bits, group) = torch.randn(out, width, generator=generator), form
    if bits == 16:
        made.weight.data.copy_(weight)
    else:
        made.weight = nn.Parameter(quantise(weight, bits, group).rows, requires_grad=False)
        made.groups = Groups(bits=bits, size=group)
    if bias is not None:
        made.bias.data = torch.randn(out, generator=generator).to(bias)
    return made


def expected(x: Tensor, each: Linear) -> Tensor:
    groups = each.groups
    matrix = each.weight.detach() if groups is None else Grouped(each.weight.detach(), groups.bits, groups.size)
    y = linear_twin(x.float(), matrix)
    return y if each.bias is None else y + each.bias.detach().float()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.usefixtures("at_level")
@torch.no_grad()
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(1, 8),
    width=st.integers(1, 4),
    layers=st.lists(
        st.tuples(st.integers(1, 70), st.sampled_from(FORMATS), st.booleans()),
        min_size=1,
        max_size=4,
    ),
)
def test_products_in_one_call_equal_the_layers(
    narrow: bool,
    seed: int,
    n: int,
    width: int,
    layers: list[tuple[int, tuple[int, int], bool]],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if narrow else torch.float32
    # Matrices in bfloat16 are for rows in bfloat16.
    formats = [
        (out, form if narrow or form[0] < 16 else (4, 32), dtype if bias else None) for out, form, bias in layers
    ]
    made = [layer(generator, out, 128 * width, form, bias) for out, form, bias in formats]
    x = torch.randn(n, 1, 128 * width, generator=generator).to(dtype)
    results = products(x, made, dtype)
    assert results is not None
    for found, each in zip(results, made, strict=True):
        y = expected(x.view(n, -1), each)
        assert found.shape == (n, 1, y.shape[-1])
        assert found.dtype == dtype
        largest = x.float().norm() * each.out_features**0.5 * (128 * width) ** 0.5
        assert (found.float().view_as(y) - y).norm() <= 1e-6 * largest + (2**-8 * y.norm() if narrow else 0)


@pytest.mark.skipif(library() is None, reason="no compiled kernels here")
def test_layers_that_are_listened_to_or_trained_run_by_themselves() -> None:
    made, x = [Linear(32, 8, dtype=torch.bfloat16) for _ in range(2)], torch.randn(1, 32).bfloat16()
    assert products(x, made, x.dtype) is None
    with torch.no_grad():
        assert products(x, made, x.dtype) is not None
        assert products(x.repeat(9, 1), made, x.dtype) is None
        made[1].register_forward_hook(lambda *_: None)
        assert products(x, made, x.dtype) is None
