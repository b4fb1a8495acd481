import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.tensors.sums import NUMBERS
from moekit.train.cross_entropy import CHUNK, linear_cross_entropy


@given(rows=st.sampled_from([1, 7, CHUNK, CHUNK + 3]), vocabulary=st.integers(2, 40), seed=st.integers(0, 99))
def test_the_chunked_head_equals_logits_and_cross_entropy(rows: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    expected = torch.autograd.grad(3 * plain, (hidden, head))
    chunked = linear_cross_entropy(hidden, head, targets)
    found = torch.autograd.grad(3 * chunked, (hidden, head))
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", [50, NUMBERS // 16 + 7])
def test_bfloat16_gradients_are_those_of_float32_to_its_rounding(words: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(700, 16, generator=generator), torch.randn(words, 16, generator=generator)
    targets = torch.randint(0, words, (700,), generator=generator)
    rounded = [x.bfloat16().requires_grad_() for x in (hidden, head)]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    found = torch.autograd.grad(linear_cross_entropy(*rounded, targets), rounded)
    expected = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum"), exact)
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


def test_the_loss_alone_needs_no_gradient() -> None:
    with torch.no_grad():
        loss = linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]))
    assert not loss.requires_grad


class Logits(TorchDispatchMode):
    """Counts the chunks of logits that are alive when one is made."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.made, self.most = shape, list[weakref.ref[Tensor]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and found.shape == self.shape:
            self.made.append(weakref.ref(found))
            self.most = max(self.most, sum(made() is not None for made in self.made))
        return found


@pytest.mark.parametrize("trains", [False, True])
def test_one_chunk_of_logits_is_alive_at_a_time(trains: bool) -> None:
    hidden, head = torch.randn(3 * CHUNK, 4).requires_grad_(trains), torch.randn(9, 4).requires_grad_(trains)
    with Logits((CHUNK, 9)) as logits:
        linear_cross_entropy(hidden, head, torch.zeros(3 * CHUNK, dtype=torch.long))
    assert (len(logits.made), logits.most) == (3, 1)
