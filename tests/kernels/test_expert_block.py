"""The compiled expert block equals the block in plain torch: sums and gradients, however the rows fall."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_counts import threads_of_torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.kernels import experts
from moekit.kernels.library import library
from moekit.moe.compiled_block import CompiledBlock, compiled_block, rows_of
from moekit.moe.dispatch import Dispatch, dispatch, everything
from moekit.moe.expert_block import ExpertBlock
from moekit.moe.routing import Routing
from moekit.moe.swiglu import SwiGLU
from oracle.compare import relative_error

pytestmark = pytest.mark.skipif(
    library() is None or library().moekit_level() < 2, reason="no compiled expert block on this machine"
)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def beginning_at(begin: int, numbers: Tensor) -> Tensor:
    """The same, as many numbers behind the beginning of its memory, as matrices of a mapped file may lie."""
    memory = numbers.new_empty(begin + numbers.numel())
    return memory[begin:].view(numbers.shape).copy_(numbers)


class Case:
    """Tokens, experts and a routing with empty experts and empty places."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        sizes: tuple[int, int, int, int, int],
        skew: float = 2.0,
        begin: int = 0,
    ) -> None:
        n_tokens, n_experts, top_k, width, inner = sizes
        source = torch.Generator().manual_seed(seed)
        popularity = skew * torch.rand(n_experts, generator=source).cumsum(0)
        noise = torch.rand(n_tokens, n_experts, generator=source)
        chosen = (popularity + noise).argsort(dim=-1)[:, :top_k]
        chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=source) < 0.2, -1)
        self.weights = torch.rand(chosen.shape, generator=source).requires_grad_()
        self.routing = Routing(chosen, self.weights, noise, noise)
        self.x = torch.randn(n_tokens, width, generator=source).to(dtype).requires_grad_()
        gate_up = torch.randn(n_experts, 2 * inner, width, generator=source).mul_(width**-0.5).to(dtype)
        down = torch.randn(n_experts, width, inner, generator=source).mul_(inner**-0.5).to(dtype)
        self.gate_up, self.down = beginning_at(begin, gate_up), beginning_at(begin, down)
        self.direction = torch.randn(n_tokens, width, generator=source).to(dtype)

    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.weights, self.gate_up.requires_grad_(), self.down.requires_grad_())

    def compiled(self, plan: Dispatch | None = None) -> Tensor:
        return CompiledBlock.apply(*self.leaves(), plan or dispatch(self.routing, 1))

    def plain(self) -> Tensor:
        """In float32: what both round."""
        leaves = [leaf.float() for leaf in self.leaves()]
        return ExpertBlock.apply(*leaves, dispatch(self.routing), None, None)

    def gradients(self, y: Tensor, **more: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves(), self.direction.to(y.dtype), **more)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_experts = draw(st.integers(1, 9))
    sizes = (
        draw(st.sampled_from([1, 2, 7, 8, 9, 24, 33, 47, 48, 49, 90, 150])),
        n_experts,
        draw(st.integers(1, n_experts)),
        draw(st.sampled_from([16, 32, 80, 144])),
        draw(st.sampled_from([16, 32, 48, 64, 96])),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    skew, begin = draw(st.sampled_from([0.0, 0.3, 2.0])), draw(st.sampled_from([0, 1, 4, 16, 32]))
    return Case(draw(st.integers(0, 2**31 - 1)), dtype, sizes, skew, begin)


def check(case: Case) -> None:
    one, other = case.compiled(), case.plain()
    allowed = ROUNDING[one.dtype]
    assert relative_error(one.detach(), other.detach()) <= allowed
    for name, mine, theirs in zip(
        ["x", "weights", "gate_up", "down"], case.gradients(one), case.gradients(other), strict=True
    ):
        assert relative_error(mine, theirs) <= allowed, name


@given(cases())
def test_sums_and_gradients_equal_those_of_plain_torch(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_with_more_rows_than_the_cache_holds(dtype: torch.dtype) -> None:
    check(Case(1, dtype, (1200, 2, 1, 512, 64), skew=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_with_more_rows_than_threads_share_room_for(dtype: torch.dtype) -> None:
    check(Case(2, dtype, (40_000, 1, 1, 144, 16)))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 576), (torch.bfloat16, 1024), (torch.bfloat16, 1040)])
def test_more_rows_than_wait_in_the_caches(dtype: torch.dtype, width: int) -> None:
    check(Case(6, dtype, (4500, 4, 3, width, 16)))


@settings(max_examples=20)
@given(case=cases(), threads=st.sampled_from([1, 2, 4]))
def test_the_result_does_not_depend_on_the_number_of_threads(case: Case, threads: int) -> None:
    y = case.compiled()
    with threads_of_torch(threads):
        again = case.compiled()
        gradients = case.gradients(again)
    assert torch.equal(again, y)
    assert all(torch.equal(one, other) for one, other in zip(gradients, case.gradients(y), strict=True))


@given(case=cases(), group_bytes=st.sampled_from([1, 1000, 9000]))
def test_groups_of_experts_add_up_to_the_whole(case: Case, group_bytes: int) -> None:
    x, weights, gate_up, down = (leaf.detach() for leaf in case.leaves())
    rows = rows_of(x, weights, down.shape[-1], dispatch(case.routing, 1))._replace(scatters=False)
    grouped = rows._replace(groups=experts.expert_groups(rows.bounds, 2 * x.shape[-1], group_bytes))
    whole, parts = (experts.forward(x, each, gate_up, down, keep=True) for each in (rows, grouped))
    assert relative_error(parts[0], whole[0].float()) <= ROUNDING[x.dtype]
    found = experts.backward(x, grouped, gate_up, down, parts[1], case.direction)
    wanted = experts.backward(x, rows, gate_up, down, whole[1], case.direction)
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_error(mine, theirs.float()) <= ROUNDING[x.dtype]


@given(case=cases(), keep=st.booleans())
def test_rows_added_up_as_they_are_computed_add_up_to_the_whole(case: Case, keep: bool) -> None:
    x, weights, gate_up, down = (leaf.detach() for leaf in case.leaves())
    rows = rows_of(x, weights, down.shape[-1], dispatch(case.routing, 1))
    whole, added = (
        experts.forward(x, rows._replace(scatters=each), gate_up, down, keep=keep) for each in (False, True)
    )
    assert relative_error(added[0], whole[0].float()) <= ROUNDING[x.dtype]
    if whole[1] is None or added[1] is None:
        return
    assert torch.equal(added[1].weights, whole[1].weights)
    found = experts.backward(x, rows._replace(scatters=True), gate_up, down, added[1], case.direction)
    wanted = experts.backward(x, rows._replace(scatters=False), gate_up, down, whole[1], case.direction)
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_error(mine, theirs.float()) <= ROUNDING[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16, 40])
def test_narrow_experts_with_many_rows(dtype: torch.dtype, threads: int) -> None:
    """More tokens than a block of sums, more columns than a slice, and threads that share blocks of few tokens."""
    case = Case(7, dtype, (9000, 6, 3, 208, 16), skew=0.3)
    assert rows_of(case.x, case.weights, 16, dispatch(case.routing, 1)).scatters
    y = case.compiled()
    with threads_of_torch(threads):
        assert torch.equal(case.compiled(), y)
        check(case)


def test_a_token_may_come_to_an_expert_twice() -> None:
    case = Case(8, torch.float32, (50, 3, 2, 48, 16))
    experts_twice = torch.zeros_like(case.routing.experts)
    plan = dispatch(case.routing._replace(experts=experts_twice), 1)
    x, weights, gate_up, down = (leaf.detach() for leaf in case.leaves())
    rows = rows_of(x, weights, 16, plan)
    whole, added = (experts.forward(x, rows._replace(scatters=s), gate_up, down, keep=False)[0] for s in (False, True))
    assert relative_error(added, whole) <= ROUNDING[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_added_up_during_products_is_all(dtype: torch.dtype, width: int, threads: int) -> None:
    case = Case(6, dtype, (2000, 40, 6, width, 32), skew=0.0)
    x, weights, gate_up, down = (leaf.detach() for leaf in case.leaves())
    rows = rows_of(x, weights, down.shape[-1], dispatch(case.routing, 1))._replace(scatters=False)
    grouped = rows._replace(groups=experts.expert_groups(rows.bounds, 1, rows.bounds[-1] // 5))
    assert len(grouped.groups) > 5
    with threads_of_torch(threads):
        whole, parts = (experts.forward(x, each, gate_up, down, keep=True) for each in (rows, grouped))
        assert relative_error(parts[0], whole[0].float()) <= ROUNDING[dtype]
        assert whole[1] is not None and parts[1] is not None
        found = experts.backward(x, grouped, gate_up, down, parts[1], case.direction)
        wanted = experts.backward(x, rows, gate_up, down, whole[1], case.direction)
    for mine, theirs in zip(found, wanted, strict=True):
        assert relative_error(mine, theirs.float()) <= ROUNDING[dtype]


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=40), row=st.integers(1, 9), limit=st.integers(1, 2000))
def test_groups_are_few_and_the_last_is_small(counts: list[int], row: int, limit: int) -> None:
    bounds = tuple(accumulate(counts, initial=0))
    begins = experts.expert_groups(bounds, row, limit)
    sizes = [(bounds[end] - bounds[begin]) * row for begin, end in pairwise(begins)]
    assert begins[0] == 0 and begins[-1] == len(counts) and all(end > begin for begin, end in pairwise(begins))
    assert len(sizes) <= max(-(-sum(counts) * row // limit) + 1, 1)
    assert max(sizes) <= limit + max(counts) * row
    assert len(sizes) == 1 or sizes[-1] <= limit / 2 + max(counts) * row


def test_a_second_backward_pass_gives_the_same() -> None:
    case = Case(3, torch.float32, (40, 4, 2, 32, 16))
    y = case.compiled()
    first, second = case.gradients(y, retain_graph=True), case.gradients(y)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Taken(TorchDispatchMode):
    """Counts the bytes of new tensors."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "zeros" in str(func):
            self.total += found.nbytes
        return found


def test_without_gradients_nothing_is_kept_for_them() -> None:
    case = Case(7, torch.bfloat16, (300, 8, 2, 32, 128), skew=0.0)
    leaves, plan = case.leaves(), dispatch(case.routing, 1)
    assert all(leaf.requires_grad for leaf in leaves)
    with Taken() as trained:
        wanted = compiled_block(*leaves, plan)
    with torch.no_grad(), Taken() as used:
        found = compiled_block(*leaves, plan)
    assert torch.equal(found, wanted.detach())
    assert trained.total - used.total >= plan.n_rows * 2 * 128 * 2


def test_padding_of_a_plan_adds_nothing() -> None:
    case = Case(4, torch.float32, (50, 4, 2, 32, 16))
    plain, padded = case.compiled(), case.compiled(dispatch(case.routing, 8))
    assert relative_error(padded.detach(), plain.detach()) <= 1e-6
    for one, other in zip(case.gradients(padded), case.gradients(plain), strict=True):
        assert relative_error(one, other) <= 1e-6


def test_numbers_that_are_not_finite_stay_so() -> None:
    case = Case(5, torch.float32, (8, 2, 2, 16, 16))
    with torch.no_grad():
        case.x[3, 5] = torch.nan
    y = case.compiled()
    routed = (case.routing.experts[3] >= 0).any()
    assert bool(y[3].isnan().all()) == bool(routed)
    assert not y[:3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 50, 700])
def test_a_feed_forward_of_all_tokens_is_one_expert(dtype: torch.dtype, n_tokens: int) -> None:
    torch.manual_seed(n_tokens)
    block, x = SwiGLU(64, 48).to(dtype), torch.randn(n_tokens, 64).to(dtype)
    fused = CompiledBlock.apply(
        x, torch.ones(n_tokens, 1), block.gate_up.weight[None], block.down.weight[None], everything(n_tokens)
    )
    block.gate_up.register_forward_pre_hook(lambda *_: None)  # a listener wants the products one by one
    assert relative_error(block(x).detach(), fused.detach().float()) <= ROUNDING[dtype]
