"""Figures about the training: loss, domains, balance over time, gradient and speed."""

import math
from collections.abc import Sequence

from moekit.report.charts import line_chart
from moekit.report.charts.scale import number
from moekit.report.curves import Curves
from moekit.report.series import Series, smooth, tail_means, thin
from moekit.report.tables import curve_table, figure

MANY = 6
"""From more layers than this, a chart shows the most uneven, the median and the most even one."""

NOISY = 60
"""From so many points on, a curve is drawn smoothed over its own values."""

ALL_BEST = " Every domain ended at its best."


def run_figures(run: Curves) -> list[str]:
    """The figures for which there are values."""
    return [
        *([_loss(run)] if run.loss else []),
        *([_validation(run.validation)] if run.validation else []),
        *([_balance(run)] if run.max_violation else []),
        *([_steadiness(run)] if run.gradient_norm.values else []),
        *([_speed(run)] if run.tokens_per_s.values else []),
    ]


def _loss(run: Curves) -> str:
    main = run.loss[0]
    answer = f"The {main.name} costs <strong>{number(main.last)}</strong> nats at step {number(main.steps[-1])}."
    trend = tail_means(main)
    if trend is None:
        answer += " The run is too short to tell a trend."
    else:
        last, before = trend
        way = "below" if last <= before else "above"
        answer += (
            f" The mean of the last 10 % of steps is {number(last)}, {number(abs(last - before), 2)} {way} that of "
            "the 10 % before."
        )
    table = curve_table([*run.loss, *run.balance_losses])
    return figure("Does it still learn?", answer + _gaps(main), _chart(run.loss, "nats per token"), table)


def _validation(lines: Sequence[Series]) -> str:
    last = sum(series.last for series in lines) / len(lines)
    answer = f"<strong>{number(last)}</strong> bits per byte on average at the last validation."
    if max(len(series.values) for series in lines) > 1:
        # Half a percent is within the noise of a validation.
        rising = [series for series in lines if series.last > min(series.finite, default=math.nan) * 1.005]
        answer += f" {len(rising)} of {len(lines)} domains ended above their best." if rising else ALL_BEST
    chart = _chart(lines, "bits per byte of held-out text")
    return figure("Does it learn every domain?", answer, chart, curve_table(lines))


def _balance(run: Curves) -> str:
    lines = run.max_violation
    worst = max(lines, key=lambda series: series.last if math.isfinite(series.last) else -1.0)
    means = [tail[0] for series in lines if (tail := tail_means(series)) is not None]
    answer = (
        f"In the last step the busiest expert of {worst.name} had <strong>{number(worst.last + 1)}</strong> times the "
        f"mean load, the most of all layers{_starved(run.dead_experts)}. "
    )
    if means:
        answer += f"Over the last 10 % of steps MaxVio is {number(sum(means) / len(means))} on average. "
    answer += "MaxVio is the largest load over the mean load, minus 1; 0 is perfect balance."
    shown = lines if len(lines) <= MANY else _extremes(lines)
    table = curve_table(lines)
    return figure("Is the load balanced over time?", answer, _chart(shown, "MaxVio of a step", zero=True), table)


def _starved(lines: Sequence[Series]) -> str:
    return f"; {number(sum(series.last for series in lines))} experts had none" if lines else ""


def _extremes(lines: Sequence[Series]) -> list[Series]:
    """Of many layers, at each step: the largest value, the median and the smallest."""
    by_step: dict[float, list[float]] = {}
    for series in lines:
        for step, value in zip(series.steps, series.values, strict=True):
            if math.isfinite(value):
                by_step.setdefault(step, []).append(value)
    ranked = {step: sorted(values) for step, values in sorted(by_step.items())}
    places = (("worst layer", 1.0), ("median layer", 0.5), ("best layer", 0.0))
    return [
        Series(name, list(ranked), [values[round(place * (len(values) - 1))] for values in ranked.values()])
        for name, place in places
    ]


def _steadiness(run: Curves) -> str:
    norm = run.gradient_norm
    largest = max(norm.finite, default=math.nan)
    at = next((step for step, value in zip(norm.steps, norm.values, strict=True) if value == largest), math.nan)
    answer = f"The gradient norm ends at <strong>{number(norm.last)}</strong>; "
    answer += f"its peak is {number(largest)} at step {number(at)}."
    table = curve_table([series for series in (norm, run.lr) if series.values])
    return figure("Are the steps steady?", answer + _gaps(norm), _chart([norm], "gradient norm", log=True), table)


def _speed(run: Curves) -> str:
    speed = run.tokens_per_s
    known = sorted(speed.finite)
    median = known[len(known) // 2] if known else math.nan
    total = f", {number(run.tokens.last)} tokens in all" if run.tokens.values else ""
    answer = (
        f"<strong>{number(round(median) if known else median)}</strong> tokens per second in the median step{total}."
    )
    chart = _chart([speed], "tokens per second", zero=True)
    return figure("How fast does it train?", answer, chart, curve_table([speed]))


def _chart(lines: Sequence[Series], unit: str, *, log: bool = False, zero: bool = False) -> str:
    """Short series as they are; long ones smoothed, over their own values drawn faintly."""
    if max(len(series.values) for series in lines) < NOISY:
        return line_chart(lines, unit=unit, log=log, zero=zero)
    smoothed = [thin(smooth(series)) for series in lines]
    return line_chart(smoothed, behind=[thin(series) for series in lines], unit=unit, log=log, zero=zero)


def _gaps(series: Series) -> str:
    lost = len(series.values) - len(series.finite)
    return f" In {number(lost)} of {number(len(series.values))} steps it is not a finite number." if lost else ""
