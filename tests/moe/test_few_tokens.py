"""Few rows are sorted as many are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.moe.dispatch import dispatch
from moekit.moe.few_tokens import FEW, are_few, few_rows_by_expert
from moekit.moe.routing import Routing


@given(
    seed=st.integers(0, 2**31 - 1), n_tokens=st.integers(0, 20), top_k=st.integers(1, 6), n_experts=st.integers(1, 9)
)
def test_few_rows_lie_where_dispatch_puts_them(seed: int, n_tokens: int, top_k: int, n_experts: int) -> None:
    source = torch.Generator().manual_seed(seed)
    experts = torch.randint(-1, n_experts, (n_tokens, top_k), generator=source)
    weights, scores = torch.rand(n_tokens, top_k), torch.rand(n_tokens, n_experts)
    for served in (None, experts.masked_fill(torch.rand(experts.shape, generator=source) < 0.3, -1)):
        routing = Routing(experts, weights, scores, scores, served=served)
        found, expected = few_rows_by_expert(routing), dispatch(routing, 1)
        assert found.bounds == expected.bounds
        assert found.full == expected.full
        for field in ("tokens", "rows", "padding"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field


@pytest.mark.parametrize("n_tokens", [FEW // 4, FEW // 4 + 1])
def test_many_are_left_to_dispatch(n_tokens: int) -> None:
    experts, scores = torch.zeros(n_tokens, 4, dtype=torch.long), torch.rand(n_tokens, 4)
    assert are_few(Routing(experts, scores, scores, scores)) == (n_tokens * 4 <= FEW)
