"""Work in a process of its own: what it takes is seen, and how it ends."""

import pytest
import torch
from measured_work import after, die, fail, hold

from moekit.config.presets.load import load_run, preset_names
from moekit.kernels import few_rows
from moekit.measure import machine
from moekit.measure.child import in_child
from moekit.measure.machine import narrow, rate_for
from moekit.measure.models import random_model
from moekit.measure.shrink import parameters, shrunk
from moekit.measure.verify import Size, compared, verify
from moekit.measure.workloads import best_rates, generator, train_steps
from moekit.plan.devices import Device
from moekit.plan.from_config import blueprint_of

MACHINE = Device("here", "cpu", 10**10, 10e9, {"float32": 1e11, "bfloat16": 1e11}, {}, 1, 0.0, "made up", "2026-01-01")


@pytest.mark.parametrize("megabytes", [200, 500])
def test_the_memory_that_work_takes_is_seen(megabytes: int) -> None:
    found = in_child(hold, (megabytes,), (1,))
    assert found.result == 1
    assert megabytes - 2 <= found.peak_bytes / 2**20 <= megabytes + 30


def test_what_follows_the_work_takes_no_memory_that_counts() -> None:
    found = in_child(hold, (200,), (1,), after)
    assert found.result == "after 1"
    assert found.peak_bytes / 2**20 <= 230


def test_an_error_in_the_work_is_told() -> None:
    with pytest.raises(ValueError, match="on purpose"):
        in_child(fail, (), ())


def test_the_death_of_the_work_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"died \(exit status 9\)"):
        in_child(die, (), ())


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("most", [60_000_000, 200_000_000, 10**13])
def test_a_shrunk_model_is_small_enough_and_of_the_same_kind(name: str, most: int) -> None:
    config = load_run(name).model
    small = shrunk(config, most)
    assert parameters(small) <= most
    assert small.moe.top_k == config.moe.top_k
    assert small.attention.n_heads == config.attention.n_heads
    assert bool(small.dense_layers) == bool(config.dense_layers)
    assert bool(small.moe_layers) == bool(config.moe_layers)
    if most == 10**13:
        assert small.n_layers == config.n_layers
        assert small.moe == config.moe


@pytest.mark.parametrize("name", ["tiny", "olmoe-1b-7b", "qwen1.5-moe-a2.7b"])
def test_a_random_model_computes_numbers(name: str) -> None:
    config = narrow(shrunk(load_run(name).model, 10**6))
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(config, dtype)
        logits = model(torch.zeros(1, 5, dtype=torch.long)).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert logits.std() > 0


def test_the_rate_of_a_model_is_that_of_its_products() -> None:
    blueprint = blueprint_of(load_run("tiny").model, "tiny", "")
    assert 0 < rate_for(blueprint, "float32", 64, 1) < 1e15


def test_the_work_is_done() -> None:
    config = load_run("tiny").model
    rates = best_rates(generator(config, "float32", 2, 8, 3), 2)
    assert min(rates) > 0
    assert train_steps(config, "bfloat16", "muon", 2, 16, steps=1) > 0


def test_a_comparison_is_a_ratio() -> None:
    predicted, measured, ratio = compared("decode", "decode", 30.0, 20.0, "tokens/s")
    assert (predicted.value, measured.value, ratio.value) == (30.0, 20.0, 1.5)


def test_predictions_stand_beside_measurements() -> None:
    section = verify(load_run("tiny").model, "tiny", MACHINE, "float32", Size(1, 32))
    for work in ("decode", "prefill", "training", "generation_memory", "training_memory"):
        ratio = section.value(f"{work}.predicted") / section.value(f"{work}.measured")
        assert section.value(f"{work}.ratio") == pytest.approx(ratio)
        assert ratio > 0


def test_one_row_is_timed_as_a_model_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(machine, "reads_once", lambda _x, _matrix, rows: rows == 1)
    monkeypatch.setattr(few_rows, "linear", lambda x, _matrix, _dtype: (kinds.append("compiled"), x)[1])
    monkeypatch.setattr(machine.F, "linear", lambda x, _matrix: (kinds.append("torch"), x)[1])
    for rows in (1, 9):
        machine._product_seconds(rows, 32, 16, torch.bfloat16)
    assert set(kinds[: len(kinds) // 2]) == {"compiled"}
    assert set(kinds[len(kinds) // 2 :]) == {"torch"}
