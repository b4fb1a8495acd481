"""What every test shares: one thread, and the same examples in every run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from moekit.kernels.library import SWITCH, library

settings.register_profile("moekit", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("moekit")
torch.set_num_threads(1)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain torch, as on a machine without a compiler."""
    library.cache_clear()
    monkeypatch.setenv(SWITCH, "1")
    yield
    library.cache_clear()
