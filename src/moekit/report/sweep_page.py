"""The page of a sweep: which variant learns best, which keeps the balance, and what each sets."""

from collections.abc import Callable, Sequence

from moekit.report.charts import line_chart
from moekit.report.charts.scale import fixed, number
from moekit.report.charts.svg import escape
from moekit.report.charts.whiskers import Whisker, whisker_chart
from moekit.report.page import document
from moekit.report.series import Series, smooth, thin
from moekit.report.sweep_values import Estimate, SweepResult, VariantResult
from moekit.report.tables import Cell, curve_table, figure, table

BALANCE = (
    ("max_violation", "MaxVio of a step", 2),
    ("max_violation_global", "MaxVio of all held-out text", 2),
    ("entropy", "entropy", 3),
    ("dead_experts", "dead experts", 1),
    ("drop_rate", "dropped", 3),
    ("experts_per_token", "experts a token", 2),
)
"""Figure, head of its column, decimals."""

Variants = Sequence[VariantResult]


def render_sweep(sweep: SweepResult) -> str:
    """The page as text, to be written as UTF-8."""
    variants = sweep.variants
    balanced = [variant for variant in variants if variant.max_violation.values]
    chapters = [
        ("How well they learn", [_learning(variants), *_gains(variants), _falling(variants)]),
        ("How they share the work", [_balance(balanced)] if balanced else []),
        ("What they cost", [_speed(variants)]),
        ("What each variant sets", [_settings(variants)]),
    ]
    main = "\n".join(f"<section><h2>{name}</h2>\n{chr(10).join(parts)}</section>" for name, parts in chapters if parts)
    note = "Written by moekit. The file sweep.json holds the same figures, those of every run among them."
    return document(sweep.title, sweep.facts, main, note, ["sweep_page.css"])


def _learning(variants: Variants) -> str:
    first = variants[0]
    rows = [
        Whisker(each.name, loss.mean, loss.spread, loss.values, not each.causal, f"{each.name} {_shown(loss, 4)}")
        for each in variants
        for loss in (each.figures["loss"],)
    ]
    drawing = whisker_chart(rows, "nats per token of held-out text")
    paired = any(each.difference is not None for each in variants)
    head = ["variant", "seeds", "loss", *([f"minus {first.name}"] if paired else []), "bits per byte"]
    cells: list[list[Cell]] = [
        [
            each.name + ("" if each.causal else " *"),
            number(len(each.seeds)),
            _shown(each.figures["loss"], 4),
            *(["" if each.difference is None else _shown(each.difference, 4, sign=True)] if paired else []),
            _shown(each.figures["bits_per_byte"], 4),
        ]
        for each in variants
    ]
    numbers = table(head, cells, kind="sweep")
    return figure("Which rule learns best?", _learning_answer(variants), drawing + numbers)


def _learning_answer(variants: Variants) -> str:
    fair = [each for each in variants if each.causal] or variants
    best = min(fair, key=lambda each: each.figures["loss"].mean)
    answer = (
        f"{_name(best)}, with <strong>{fixed(best.figures['loss'].mean, 4)}</strong> nats per token. Less is better."
    )
    if any(len(each.seeds) > 1 for each in variants):
        answer += " Lines are 95 % intervals of the mean over seeds, small dots single seeds."
    if not all(each.causal for each in variants):
        answer += " * looks at later tokens (ring), so that its loss cannot be compared."
    return answer


def _gains(variants: Variants) -> list[str]:
    """Differences with the same seed, which take out what a seed does to all variants alike."""
    first, others = variants[0], [(each, each.difference) for each in variants if each.difference is not None]
    if not others:
        return []
    clear = [gap for _, gap in others if gap.spread is not None and abs(gap.mean) > gap.spread]
    best, gain = min(others, key=lambda entry: entry[1].mean)
    answer = f"<strong>{_shown(gain, 4, sign=True)}</strong> nats per token with {_name(best)}, the lowest. "
    if gain.spread is not None:
        answer += (
            f"{len(clear)} of {len(others)} intervals leave out 0, where “{escape(first.name)}” is. "
            f"Each difference is one of the same seed, hence of the same text in the same order."
        )
    rows = [
        Whisker(each.name, gap.mean, gap.spread, gap.values, False, f"{each.name} {_shown(gap, 4, sign=True)}")
        for each, gap in others
    ]
    chart = whisker_chart(rows, f"nats per token, minus those of “{first.name}”", zero=True)
    return [figure(f"How much better or worse than “{first.name}” is each?", answer, chart)]


def _falling(variants: Variants) -> str:
    lines = [each.loss for each in variants]
    ends = {each.name: each.loss.last for each in variants}
    best = min(ends, key=lambda name: ends[name])
    answer = (
        f"At the last step the training loss is <strong>{number(ends[best], 4)}</strong> nats per token with "
        f"{_quoted(best)}, the lowest, and {number(max(ends.values()), 4)} at most. Means over seeds, smoothed. "
        "Rules whose experts choose among all tokens in training see later ones there; held-out text decides."
    )
    return figure(
        "How fast does the loss fall?", answer, _chart(lines, "nats per token in training"), curve_table(lines)
    )


def _balance(variants: Variants) -> str:
    late = {each.name: each.figures["max_violation"].mean for each in variants}
    best, worst = min(late, key=lambda name: late[name]), max(late, key=lambda name: late[name])
    answer = (
        f"In the last quarter of the steps the busiest expert has <strong>{number(late[best] + 1)}</strong> times the "
        f"mean load with {_quoted(best)}"
        + (f" and {number(late[worst] + 1)} times with {_quoted(worst)}" if worst != best else "")
        + ". MaxVio is the largest load over the mean load, minus 1, here before any token is dropped; 0 is perfect "
        "balance. Means over layers and seeds."
    )
    lines = [each.max_violation for each in variants]
    columns = [entry for entry in BALANCE if any(entry[0] in each.figures for each in variants)]
    rows: list[list[Cell]] = [
        [each.name, *(_cell(each, key, decimals) for key, _, decimals in columns)] for each in variants
    ]
    numbers = table(["variant", *(head for _, head, _ in columns)], rows, kind="sweep")
    drawing = _chart(lines, "MaxVio of a step", zero=True) + numbers
    return figure("Who keeps the balance?", answer, drawing, curve_table(lines))


def _speed(variants: Variants) -> str:
    speed: Callable[[VariantResult], float] = lambda each: each.figures["tokens_per_s"].mean  # noqa: E731
    fast, slow = max(variants, key=speed), min(variants, key=speed)
    answer = f"{_name(fast)} trains on <strong>{number(round(speed(fast)))}</strong> tokens per second"
    if fast is not slow:
        answer += f", {_name(slow)} on {number(round(speed(slow)))}"
    rows: list[list[Cell]] = [[each.name, number(round(speed(each)))] for each in variants]
    answer += ": medians of the steps, means over seeds, on the machine as busy as it was."
    return figure("How fast does each train?", answer, table(["variant", "tokens per second"], rows))


def _settings(variants: Variants) -> str:
    parts = []
    for each in variants:
        lines = [escape(each.about)] if each.about else []
        lines += [f"<code>{escape(key)} = {escape(value)}</code>" for key, value in each.sets.items()]
        parts.append(f"<dt>{escape(each.name)}</dt>" + "".join(f"<dd>{line}</dd>" for line in lines or ["nothing"]))
    return f'<dl class="variants">{"".join(parts)}</dl>'


def _name(each: VariantResult) -> str:
    return _quoted(each.name)


def _quoted(name: str) -> str:
    return f"“{escape(name)}”"


def _cell(each: VariantResult, key: str, decimals: int) -> str:
    return _shown(each.figures[key], decimals) if key in each.figures else "\N{EN DASH}"


def _shown(found: Estimate, decimals: int, *, sign: bool = False) -> str:
    plus = "+" if sign and found.mean > 0 else ""
    # What is the same for every seed by construction needs no interval.
    spread = "" if not found.spread else f" ± {fixed(found.spread, decimals)}"
    return f"{plus}{fixed(found.mean, decimals)}{spread}"


def _chart(lines: Sequence[Series], unit: str, *, zero: bool = False) -> str:
    return line_chart([thin(smooth(series)) for series in lines], unit=unit, zero=zero, height=260)
