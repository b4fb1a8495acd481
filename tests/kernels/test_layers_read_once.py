"""Layers give the same with the compiled products as without them, to the rounding of bfloat16."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.cli.device import prepare_device
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.kernels import few_rows
from moekit.kernels.library import SWITCH, library, pending
from moekit.kernels.linear import MOST, Linear, reads_once
from moekit.moe.layer import MoE

seeds = st.integers(0, 2**31 - 1)
EPSILON = 2**-8
"""Half a unit in the last place of bfloat16, relative."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: Tensor, exact: Tensor, roundings: int) -> bool:
    scale = exact.abs().amax().clamp_min(1e-6)
    return bool(((found.float() - exact).abs() <= roundings * EPSILON * scale).all())


@given(seed=seeds, rows=st.integers(1, 2 * MOST), inputs=st.integers(1, 70), out=st.integers(1, 40), bias=st.booleans())
def test_a_linear_layer_is_the_exact_product_rounded_once(
    seed: int, rows: int, inputs: int, out: int, bias: bool
) -> None:
    layer, x = Linear(inputs, out, bias=bias), torch.randn(2, rows, inputs, generator=generator(seed)).bfloat16()
    layer = layer.bfloat16()
    with torch.inference_mode():
        found = layer(x)
    exact = torch.nn.functional.linear(x.float(), layer.weight.float(), None if not bias else layer.bias.float())
    assert found.shape == (2, rows, out)
    assert found.dtype == torch.bfloat16
    assert close(found, exact.detach(), 2)


@given(seed=seeds, n_tokens=st.integers(1, MOST), top_k=st.integers(1, 6))
def test_experts_give_what_they_give_in_training(seed: int, n_tokens: int, top_k: int) -> None:
    config = MoEConfig(width=64, expert_width=32, n_routed=6, n_shared=1, top_k=top_k, routing=TopKRouting(scale=2.0))
    layer = MoE(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2, generator=generator(seed))
    x = torch.randn(1, n_tokens, 64, generator=generator(seed)).bfloat16()
    exact = layer.float()(x.float()).y.detach()
    layer = layer.bfloat16().eval()
    with torch.inference_mode():
        found = layer(x).y
    assert close(found, exact, 8)


def test_gradients_other_types_and_many_rows_take_torchs_product() -> None:
    weight = torch.zeros(4, 32, dtype=torch.bfloat16)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    assert not reads_once(x, weight, 1)
    with torch.inference_mode():
        assert reads_once(x, weight, 1) == few_rows.runs_here()
        assert not reads_once(x, weight, MOST + 1)
        assert not reads_once(x, weight, 0)
        assert not reads_once(x.float(), weight.float(), 1)


@pytest.mark.usefixtures("without_kernels")
def test_switched_off_nothing_is_compiled_and_all_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layer = Linear(32, 8).bfloat16()
    with torch.inference_mode():
        found = layer(torch.ones(1, 32, dtype=torch.bfloat16))
    assert found.shape == (1, 8)
    assert not few_rows.runs_here()
    assert not list(tmp_path.iterdir())
    assert few_rows.linear(torch.ones(1, 32), layer.weight.detach()).shape == (1, 8)


def test_without_a_compiler_all_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library.cache_clear()
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library() is None
    library.cache_clear()


def test_it_is_known_whether_something_will_be_compiled_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if library() is None:
        pytest.skip("no compiled kernels on this machine")
    assert not pending()
    prepare_device("cpu")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pending()
    prepare_device("cpu")
    assert "compiling kernels for this machine" in capsys.readouterr().err
    monkeypatch.setenv(SWITCH, "1")
    assert not pending()
    monkeypatch.delenv(SWITCH)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not pending()


def test_a_source_that_does_not_compile_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    library.cache_clear()
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert library() is None
    assert not list((tmp_path / "cache" / "moekit" / "kernels").iterdir())
    library.cache_clear()
