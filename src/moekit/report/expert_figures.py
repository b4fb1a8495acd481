"""Figures about the experts: who works how much, and for which domain."""

from collections.abc import Sequence

from moekit.report.charts import Mark, dot_strip, heat_key, heat_map, load_bars, mark_key
from moekit.report.charts.scale import fixed, linear_axis, number, tick_text
from moekit.report.tables import Cell, Html, figure, table
from moekit.report.values import ExpertLayer, ExpertUse

MAPS = 12
"""Most layers with a heat map of their own."""


def load_figure(use: ExpertUse) -> str:
    """Do some experts starve?"""
    layers = use.layers
    dead, n = sum(layer.dead_experts for layer in layers), sum(len(layer.load) for layer in layers)
    over_mean = [
        (value * len(layer.load) / max(sum(layer.load), 1), layer.layer, i)
        for layer in layers
        for i, value in enumerate(layer.load)
    ]
    least, most = min(over_mean), max(over_mean)
    answer = (
        f"<strong>{number(dead)}</strong> of {number(n)} experts got nothing from {number(sum(use.tokens))} "
        f"traced tokens. "
        f"The least used is expert {least[2]} of layer {least[1]} with {number(least[0], 2)} times the mean load, "
        f"the busiest expert {most[2]} of layer {most[1]} with {number(most[0], 2)} times the mean."
    )
    bars = load_bars(
        [(f"layer {layer.layer}", layer.load, f"MaxVio {number(layer.max_violation, 2)}") for layer in layers]
    )
    head = ["layer", "MaxVio", "entropy", "dead", "least load", "mean load", "largest load"]
    numbers = table(head, [_load_row(layer) for layer in layers])
    return figure("Do some experts starve?", answer, bars, numbers)


def _load_row(layer: ExpertLayer) -> list[Cell]:
    load = layer.load or (0,)
    mean = sum(load) / len(load)
    return [number(layer.layer), layer.max_violation, layer.entropy, layer.dead_experts, min(load), mean, max(load)]


def divergence_figure(use: ExpertUse) -> str:
    """Do domains use different experts?"""
    layers = use.layers
    top = max((value for layer in layers for row in layer.share for value in row), default=0.0)
    shown = [layers[round(i * (len(layers) - 1) / (MAPS - 1))] for i in range(MAPS)] if len(layers) > MAPS else layers
    maps = "".join(
        heat_map(
            f"layer {layer.layer}",
            f"{fixed(layer.divergence, 4)} bits",
            use.domains,
            layer.share,
            top,
            layer is shown[-1],
        )
        for layer in shown
    )
    drawing = heat_key(use.uniform_share, top) + f'<div class="stack">{maps}</div>' + _control(layers)
    return figure("Do domains use different experts?", _answer(use), drawing, _share_tables(use))


def _answer(use: ExpertUse) -> str:
    n = len(use.layers)
    seen = sum(layer.divergence for layer in use.layers) / n
    chance = sum(layer.shuffled_mean for layer in use.layers) / n
    return (
        f"The Jensen-Shannon divergence between the domains is <strong>{number(seen)}</strong> bits on average over "
        f"the layers; with the tokens' domains shuffled {use.permutations} times, which leaves chance alone, "
        f"{number(chance, 2)} on average (the table adds the 95th percentile). It is 0 if all domains use the experts "
        f"alike and {_most_bits(len(use.domains))} if no expert serves two of them. "
        "Each cell below is the share of a domain's tokens that visit the expert."
    )


def _most_bits(n_domains: int) -> str:
    return number((n_domains).bit_length() - 1.0) if n_domains & (n_domains - 1) == 0 else f"log2 {n_domains}"


def _control(layers: Sequence[ExpertLayer]) -> str:
    """Observed against shuffled, layer by layer."""
    known = [value for layer in layers for value in (layer.divergence, layer.shuffled_mean, layer.shuffled_p95)]
    axis = linear_axis(known, zero=True, n_ticks=4)
    head: list[Cell] = [
        "layer",
        Html(f"{mark_key('disc')}observed"),
        Html(f"{mark_key('ring')}shuffled"),
        Html(f"{mark_key('tick')}shuffled, 95 %"),
        Html(f'<span class="scale">0 to {tick_text(axis.high, axis)} bits</span>'),
    ]
    rows = []
    for layer in layers:
        values = (layer.divergence, layer.shuffled_mean, layer.shuffled_p95)
        marks = [
            Mark(layer.divergence, "disc", f"observed: {fixed(layer.divergence, 4)}"),
            Mark(layer.shuffled_mean, "ring", f"shuffled: {fixed(layer.shuffled_mean, 4)}"),
            Mark(layer.shuffled_p95, "tick", f"95th percentile: {fixed(layer.shuffled_p95, 4)}"),
        ]
        figures = [Html(f'<span class="number">{fixed(value, 4)}</span>') for value in values]
        rows.append([number(layer.layer), *figures, Html(dot_strip(marks, axis))])
    return table(head, rows, kind="headline")


def _share_tables(use: ExpertUse) -> str:
    """For each layer, the experts each domain visits most; then the divergence of each two domains."""
    rows: list[list[Cell]] = []
    for layer in use.layers:
        for name, share in zip(use.domains, layer.share, strict=True):
            best = sorted(range(len(share)), key=lambda i: -share[i])[:3]
            rows.append([number(layer.layer), name, *(f"{i} ({number(100 * share[i])} %)" for i in best)])
    width = max((len(row) for row in rows), default=2)
    head = ["layer", "domain", "expert visited most", "second", "third"][:width]
    pairs: list[list[Cell]] = [
        [f"{use.domains[a]}, {use.domains[b]}", *(fixed(layer.pairwise[a][b], 4) for layer in use.layers)]
        for a in range(len(use.domains))
        for b in range(a + 1, len(use.domains))
    ]
    both = table(head, rows)
    if pairs:
        both += "<p>Divergence of two domains alone, in bits, from 0 to 1:</p>"
        both += table(["domains", *(f"layer {layer.layer}" for layer in use.layers)], pairs)
    return both
