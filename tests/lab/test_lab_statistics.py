"""Means over seeds, intervals by Student's t, and differences paired by seed."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lab_cases import write_lab

from moekit.config.lab import Lab, read_lab
from moekit.config.routing import ExpertChoiceRouting
from moekit.lab.carry_out import Done
from moekit.lab.figures import RunFigures, late_mean
from moekit.lab.places import places
from moekit.lab.summary import estimate, summarise, to_json


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, by summing its density."""
    gammas = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(gammas) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, 20, 2_000_001)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))])
    return float(x[np.searchsorted(area, 0.475)])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_the_interval_is_that_of_students_t(n: int) -> None:
    values = [math.sin(7 * i) + 2 for i in range(n)]
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    found = estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.spread == pytest.approx(quantile(n - 1) * deviation / math.sqrt(n), rel=3e-3)


def test_one_seed_has_no_interval() -> None:
    assert estimate([2.5]) == (2.5, None, (2.5,))


def test_late_means_are_of_all_layers_in_the_last_quarter_of_the_steps() -> None:
    rows = [{"layers": [{"drop_rate": step}, {"drop_rate": 10 * step}]} for step in range(8)]
    assert late_mean(rows, "drop_rate") == (6 + 60 + 7 + 70) / 4
    assert late_mean(rows[:2], "drop_rate") == (1 + 10) / 2
    assert late_mean([{"layers": []}], "drop_rate") is None


def figures(loss: float) -> RunFigures:
    return RunFigures(
        loss=loss,
        bits_per_byte=loss / 2,
        max_violation=1.0,
        max_violation_global=0.5,
        entropy=0.9,
        dead_experts=0,
        drop_rate=0.0,
        experts_per_token=2.0,
        tokens_per_s=1000.0,
        domains={},
    )


def done(lab: Lab, losses: dict[tuple[str, int], float]) -> list[Done]:
    runs = {(place.variant.name, place.seed): place for place in places(lab, Path("nowhere"))}
    return [Done(runs[key], figures(loss)) for key, loss in losses.items()]


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    lab = read_lab(write_lab(tmp_path))
    losses = {("plain", 3): 5.0, ("plain", 4): 7.0, ("choice", 3): 4.9, ("choice", 4): 6.8}
    plain, choice = summarise(lab, done(lab, losses))
    assert plain.difference is None
    assert plain.figures["loss"].spread == pytest.approx(quantile(1), rel=1e-3)
    assert choice.difference is not None
    assert choice.difference.mean == pytest.approx(-0.15)
    assert choice.difference.spread == pytest.approx(quantile(1) * 0.05, rel=1e-3)


def test_a_seed_that_only_one_has_finished_makes_no_pair(tmp_path: Path) -> None:
    lab = read_lab(write_lab(tmp_path))
    results = summarise(lab, done(lab, {("plain", 3): 5.0, ("choice", 3): 4.5, ("choice", 4): 9.0}))
    assert results[1].difference == (-0.5, None, (-0.5,))
    assert results[1].seeds == (3, 4)
    (alone,) = summarise(lab, done(lab, {("choice", 4): 9.0}))
    assert alone.name == "choice" and alone.difference is None


def test_a_variant_that_looks_at_later_tokens_is_marked_and_not_compared(tmp_path: Path) -> None:
    lab = read_lab(write_lab(tmp_path))
    plain, choice = lab.variants
    model = choice.config.model
    moe = replace(model.moe, routing=ExpertChoiceRouting())
    choice = replace(choice, config=replace(choice.config, model=replace(model, moe=moe)))
    lab = replace(lab, variants=(plain, choice))
    runs = done(lab, {("plain", 3): 5.0, ("choice", 3): 4.0})
    results = summarise(lab, runs)
    assert [result.causal for result in results] == [True, False]
    assert results[1].difference is None
    assert [entry["causal"] for entry in to_json(lab, runs, results)["variants"]] == [True, False]
