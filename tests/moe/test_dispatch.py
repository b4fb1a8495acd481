"""Compiled code sorts a routing's rows as plain torch does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.kernels.library import library
from moekit.moe.dispatch import dispatch, sorted_rows
from moekit.moe.routing import Routing


@given(
    seed=st.integers(0, 2**31 - 1), n_tokens=st.integers(0, 50), top_k=st.integers(1, 6), n_experts=st.integers(1, 20)
)
def test_rows_lie_where_a_stable_sort_puts_them(seed: int, n_tokens: int, top_k: int, n_experts: int) -> None:
    source = torch.Generator().manual_seed(seed)
    experts = torch.randint(-1, n_experts, (n_tokens, top_k), generator=source)
    weights, scores = torch.rand(n_tokens, top_k), torch.rand(n_tokens, n_experts)
    dropped = experts.masked_fill(torch.rand(experts.shape, generator=source) < 0.3, -1)
    for served in (None, dropped, dropped.T.contiguous().T):
        routing = Routing(experts, weights, scores, scores, served=served)
        found, expected = dispatch(routing, 1), sorted_rows(experts if served is None else served, n_experts, 1)
        assert found.bounds == expected.bounds
        assert found.full == expected.full
        for field in ("tokens", "rows", "padding"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("n_tokens", "top_k"), [(1999, 3), (4099, 1), (700, 7)])
def test_rows_of_many_tokens_lie_where_a_stable_sort_puts_them(threads: int, n_tokens: int, top_k: int) -> None:
    source, before = torch.Generator().manual_seed(threads), torch.get_num_threads()
    experts = torch.randint(-1, 30, (n_tokens, top_k), generator=source)
    scores = torch.rand(n_tokens, 40)
    try:
        torch.set_num_threads(threads)
        found = dispatch(Routing(experts, scores[:, :top_k], scores, scores), 1)
    finally:
        torch.set_num_threads(before)
    expected = sorted_rows(experts, 40, 1)
    assert found.bounds == expected.bounds
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.rows, expected.rows)


@pytest.mark.skipif(library() is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("expert", [-2, 3, 2**40])
@pytest.mark.parametrize("n_tokens", [1, 9000])
def test_an_expert_that_is_not_there_is_refused(expert: int, n_tokens: int) -> None:
    experts, scores = torch.zeros(n_tokens, 2, dtype=torch.long), torch.rand(n_tokens, 3)
    experts[-1, 1] = expert
    with pytest.raises(ValueError, match="experts 0 to 2"):
        dispatch(Routing(experts, scores[:, :2], scores, scores), 1)
