"""Adding in parts adds the same numbers."""

import pytest
import torch

from moekit.tensors import sums
from moekit.tensors.sums import add_


@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (4, 3, 2), (1, 40), (40, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_in_parts_is_that_of_all_at_once(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "NUMBERS", 6)
    source = torch.Generator().manual_seed(0)
    total, part = torch.randn(shape, generator=source), torch.randn(shape, generator=source).to(dtype)
    expected = total + part
    found = add_(total, part)
    assert found is total
    assert torch.equal(found, expected)
