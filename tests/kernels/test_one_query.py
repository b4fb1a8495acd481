"""One new token's attention over a cache equals its plain twin, on every instruction set that the machine has."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_counts import threads_of_torch
from torch import Tensor

from moekit.kernels.one_query import Past, Turn, attend, attend_twin

levels = pytest.mark.parametrize("level", [0, 1, 2])
types = pytest.mark.parametrize("past_type", [torch.bfloat16, torch.float32], ids=["past-bf16", "past-float32"])
# A bfloat16 output may round either way, and so may a key that is turned in float32 first.
LARGEST_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def copied(past: Past) -> Past:
    return Past(past.keys.clone(), None if past.values is None else past.values.clone(), past.length)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


@levels
@types
@pytest.mark.parametrize("new_type", [torch.bfloat16, torch.float32], ids=["new-bf16", "new-float32"])
@pytest.mark.usefixtures("at_level")
@given(
    seed=st.integers(0, 2**31 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    unit=st.sampled_from([2, 16, 32]),
    widths=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    length=st.integers(0, 200),
    latent=st.booleans(),
    data=st.data(),
)
def test_one_token_attends_as_its_twin(
    past_type: torch.dtype,
    new_type: torch.dtype,
    seed: int,
    shape: tuple[int, int, int],
    unit: int,
    widths: tuple[int, int],
    length: int,
    latent: bool,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (batch, kv_heads, group), width, v_width = shape, unit * widths[0], unit * widths[1]
    v_width = min(v_width, width) if latent else v_width
    half = data.draw(st.integers(0, width // 2))
    capacity = length + data.draw(st.integers(1, 5))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    angles = random(data.draw(st.sampled_from([1, batch])), half) * 9
    turn = Turn(angles.cos(), angles.sin(), data.draw(st.booleans()))
    keys = random(batch, kv_heads, capacity, width).to(past_type)
    values = None if latent else random(batch, kv_heads, capacity, v_width).to(past_type)
    q, k = random(batch, kv_heads * group, width).to(new_type), random(batch, kv_heads, width).to(new_type)
    v = None if latent else random(batch, kv_heads, v_width).to(new_type)
    mine, twin = (copied(Past(keys, values, length)) for _ in range(2))
    scale = data.draw(st.sampled_from([0.01, 1.0, 3.0])) * width**-0.5
    found = attend(q, k, v, turn, mine, scale, v_width)
    expected = attend_twin(q, k, v, turn, twin, scale, v_width)
    error = LARGEST_ERROR[torch.bfloat16 if torch.bfloat16 in (past_type, new_type) else torch.float32]
    assert found.dtype == new_type
    assert relative_error(found, expected) <= error
    assert relative_error(mine.keys[:, :, length], twin.keys[:, :, length]) <= error
    untouched = torch.arange(capacity) != length
    assert torch.equal(mine.keys[:, :, untouched], keys[:, :, untouched])
    if mine.values is not None and twin.values is not None:
        assert torch.equal(mine.values, twin.values)


@levels
@types
@pytest.mark.usefixtures("at_level")
def test_a_past_is_divided_among_threads_without_a_trace(past_type: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    turn = Turn(torch.ones(1, 64), torch.zeros(1, 64), False)
    keys, values = (torch.randn(1, 1, 999, 128, generator=generator).to(past_type) for _ in range(2))
    q, k, v = torch.randn(3, 1, 1, 128, generator=generator).unbind()
    found = []
    for n in (1, 2, 3, 4):
        with threads_of_torch(n):
            found.append(attend(q, k, v, turn, Past(keys.clone(), values.clone(), 998), 0.3, 128))
    for each in found[1:]:
        assert relative_error(each, found[0]) <= 2e-6


@levels
@pytest.mark.usefixtures("at_level")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_number_that_is_none_does_not_disappear(wrong: float) -> None:
    turn = Turn(torch.ones(1, 16), torch.zeros(1, 16), False)
    past = Past(torch.zeros(1, 1, 5, 32), torch.zeros(1, 1, 5, 32), 4)
    k = torch.full((1, 1, 32), wrong)
    assert attend(torch.ones(1, 1, 32), k, torch.ones(1, 1, 32), turn, past, 1.0, 32).isnan().all()
