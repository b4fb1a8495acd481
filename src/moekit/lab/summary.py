"""From the figures of single runs to means over seeds, their intervals, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from moekit.config.lab import Lab, Variant, differences
from moekit.evaluate.text import student
from moekit.lab.carry_out import Done
from moekit.report.series import Series
from moekit.report.sweep_values import Estimate, VariantResult
from moekit.train.metrics import METRICS, read_metrics


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values of independent seeds, and half its 95 % interval: t s / sqrt(n)."""
    n = len(values)
    if n < 2:
        return Estimate(fmean(values), None, tuple(values))
    return Estimate(fmean(values), student(n - 1) * stdev(values) / sqrt(n), tuple(values))


def summarise(lab: Lab, runs: Sequence[Done]) -> list[VariantResult]:
    """Every variant of which a run is finished, in the order of the lab."""
    first = _of(lab.variants[0], runs)
    found = [(variant, _of(variant, runs)) for variant in lab.variants]
    return [_summary(variant, own, first) for variant, own in found if own]


def to_json(lab: Lab, runs: Sequence[Done], results: Sequence[VariantResult]) -> dict[str, Any]:
    """All figures of every run and variant, what each variant sets, and in what the configurations differ."""
    differs, by_name = differences(lab), {variant.name: variant for variant in lab.variants}
    variants = [
        {
            "name": result.name,
            "about": result.about,
            "causal": result.causal,
            "figures": {name: _plain(found) for name, found in result.figures.items()},
            "difference": None if result.difference is None else _plain(result.difference),
            "runs": [_plain_run(done) for done in _of(by_name[result.name], runs)],
            "sets": dict(result.sets),
            "differs": differs[result.name],
        }
        for result in results
    ]
    return {"title": lab.title, "seeds": list(lab.seeds), "first": lab.variants[0].name, "variants": variants}


def _of(variant: Variant, runs: Sequence[Done]) -> list[Done]:
    return [done for done in runs if done.place.variant.name == variant.name]


def _summary(variant: Variant, runs: Sequence[Done], first: Sequence[Done]) -> VariantResult:
    tables = [asdict(done.figures) for done in runs]
    names = [name for name, value in tables[0].items() if name != "domains" and value is not None]
    rows = [read_metrics(done.place.folder / METRICS) for done in runs]
    return VariantResult(
        name=variant.name,
        about=variant.about,
        sets=variant.sets,
        seeds=tuple(done.place.seed for done in runs),
        causal=_causal(variant),
        figures={name: estimate([float(table[name]) for table in tables]) for name in names},
        difference=_difference(runs, first),
        max_violation=_mean_series(variant.name, rows, _violation),
        loss=_mean_series(variant.name, rows, lambda row: row["loss"]),
    )


def _difference(runs: Sequence[Done], first: Sequence[Done]) -> Estimate | None:
    """Of the loss to the first variant's with the same seed. Where either looks at later tokens there is none."""
    before = {done.place.seed: done.figures.loss for done in first}
    pairs = [done.figures.loss - before[done.place.seed] for done in runs if done.place.seed in before]
    itself = runs[0].place.variant.name == first[0].place.variant.name if first else False
    fair = all(_causal(done.place.variant) for done in (*runs, *first))
    return estimate(pairs) if pairs and fair and not itself else None


def _causal(variant: Variant) -> bool:
    model = variant.config.model
    return not model.moe_layers or model.moe.routing.causal


def _violation(row: Mapping[str, Any]) -> float | None:
    return fmean(layer["max_violation"] for layer in row["layers"]) if row["layers"] else None


def _mean_series(name: str, runs: Sequence[Sequence[Mapping[str, Any]]], figure: Any) -> Series:
    """The mean over runs of a figure of each step; empty where rows have none."""
    steps, means = [], []
    for rows in zip(*runs, strict=True):
        values = [figure(row) for row in rows]
        if None not in values:
            steps.append(float(rows[0]["step"]))
            means.append(fmean(values))
    return Series(name, steps, means)


def _plain(found: Estimate) -> dict[str, Any]:
    return {"mean": found.mean, "spread": found.spread, "values": list(found.values)}


def _plain_run(done: Done) -> dict[str, Any]:
    folder = "/".join(done.place.folder.parts[-3:])
    return {"seed": done.place.seed, "folder": folder, **asdict(done.figures)}
