"""Memory: the key-value cache, the weights as stored, the working set of a forward pass, and a training step."""

from collections.abc import Iterable

from moekit.plan.activations import logits, working_set
from moekit.plan.blueprint import PARTS, Attention, Blueprint
from moekit.plan.compute import check_sizes
from moekit.plan.figure import Figure, Section
from moekit.plan.layout import Layout
from moekit.plan.precision import Format, Precision
from moekit.plan.training import LIBRARY, Training, training_figures, training_on_device

__all__ = ["Layout", "Training", "cache_bytes", "kv_cache", "memory", "stored_bytes", "working_bytes"]


def kv_cache(blueprint: Blueprint, kv: Format, context: int, batch: int) -> Section:
    """What attention keeps of earlier tokens: numbers and bytes for each, in all, and what other kinds would keep."""
    check_sizes(context=context, batch=batch)
    layers = [a for a in blueprint.attentions if a.causal]
    elements = sum(a.layers * a.cached for a in layers)
    each = sum(kv.bytes_of((a.cached,), a.layers) for a in layers)
    windows = sorted({a.window for a in layers if a.window is not None})
    window = f"; layers with a window keep its last {', '.join(f'{w:,}' for w in windows)} tokens" if windows else ""
    figures = (
        Figure(
            "elements_per_token",
            "numbers kept, each token",
            elements,
            "",
            "sum over layers of 2 kv_heads d_head, or of latent + rotary (MLA)",
            _in_numbers((a.layers, a.cached) for a in layers),
            "arXiv 2405.04434, Table 1",
        ),
        Figure(
            "bytes_per_token",
            "kept, each token",
            each,
            "B",
            "numbers x bytes, scales included",
            f"{elements:,} x {kv.bits / 8:g}" + (" + scales" if kv.scale_bits else ""),
            f"{kv.name}; each layer's numbers of a token are rounded on their own" + window,
        ),
        Figure(
            "total",
            "cache",
            cache_bytes(blueprint, kv, context, batch),
            "B",
            "sequences x sum over layers of min(tokens, window) x bytes",
            f"{batch:,} x ({_rows_in_numbers(layers, kv, context)})",
            f"{batch:,} sequences of {context:,} tokens{window}",
        ),
        *_expanded(layers, kv),
        *_against_multi_head(layers, kv, elements),
    )
    notes = () if len(layers) == len(blueprint.attentions) else ("Layers without causal attention keep nothing.",)
    return Section("kv_cache", "Key-value cache", figures, notes)


def _rows_in_numbers(layers: list[Attention], kv: Format, context: int) -> str:
    return _in_numbers((min(context, a.window or context), kv.bytes_of((a.cached,), a.layers)) for a in layers)


def cache_bytes(blueprint: Blueprint, kv: Format, context: int, batch: int) -> int:
    """Bytes of the cache of `batch` sequences of `context` tokens; a layer keeps no more than its window."""
    return batch * sum(
        (context if a.window is None else min(context, a.window)) * kv.bytes_of((a.cached,), a.layers)
        for a in blueprint.attentions
        if a.causal
    )


def stored_bytes(blueprint: Blueprint, precision: Precision) -> dict[str, int]:
    """Bytes of the weights by part, in the order of `PARTS`, scales included."""
    found = dict[str, int]()
    for part in PARTS:
        size = sum(precision.bytes_of(w) for w in blueprint.weights if w.part == part)
        if size:
            found[part] = size
    return found


def memory(
    blueprint: Blueprint,
    precision: Precision,
    kv: Format,
    context: int,
    batch: int,
    training: Training | None = None,
    layout: Layout | None = None,
) -> Section:
    """Bytes of weights, cache and working set of inference; of a training step; and on each device of a `layout`."""
    check_sizes(context=context, batch=batch)
    layout = layout or Layout()
    layout.check()
    stored = stored_bytes(blueprint, precision)
    weights = sum(size for part, size in stored.items() if part != "prediction")
    cache = cache_bytes(blueprint, kv, context, batch)
    prompt, decode = (working_bytes(blueprint, precision, tokens, batch) for tokens in (context * batch, batch))
    figures = [
        *_weight_figures(blueprint, precision, stored, weights),
        Figure("kv_cache", "cache", cache, "B", "sequences x tokens x bytes", "", f"{kv.name}, see the cache"),
        _working("prompt", "working set, prompt at once", prompt, context * batch),
        _working("decode", "working set, one more token", decode, batch),
        Figure("library", "library", LIBRARY, "B", note="what a process holds before any model, measured on a CPU"),
        Figure(
            "total",
            "inference",
            weights + cache + prompt + LIBRARY,
            "B",
            "weights + cache + working set of the prompt + library",
            f"{weights:,} + {cache:,} + {prompt:,} + {LIBRARY:,}",
            "what a process takes on a CPU; the prompt is read at once",
        ),
    ]
    if training is not None:
        figures += training_figures(blueprint, training)
    if layout.devices > 1:
        figures += _on_device(blueprint, precision, cache, training, layout)
    return Section("memory", "Memory", tuple(figures))


def _weight_figures(blueprint: Blueprint, precision: Precision, stored: dict[str, int], total: int) -> list[Figure]:
    figures = [
        Figure(
            f"weights.{part}",
            f"weights, {part}",
            size,
            "B",
            "numbers x bits / 8 + scales",
            " + ".join(
                f"{w.stored:,} x {precision.format_of(w).bits} / 8"
                for w in blueprint.weights
                if w.part == part and w.count
            ),
            ", ".join(sorted({precision.format_of(w).name for w in blueprint.weights if w.part == part and w.count})),
        )
        for part, size in stored.items()
    ]
    numbers = " + ".join(f"{size:,}" for part, size in stored.items() if part != "prediction")
    note = f"{precision.name}; without prediction modules, which generation does not use"
    return [*figures, Figure("weights.total", "weights", total, "B", "sum of the parts", numbers, note)]


def working_bytes(blueprint: Blueprint, precision: Precision, tokens: int, sequences: int) -> int:
    """Bytes that a forward pass of `tokens` holds, with the last logits of `sequences`."""
    width = 4 if precision.default.compute == "float32" else 2
    return working_set(blueprint, tokens, width) + logits(blueprint, sequences, width)


def _working(key: str, label: str, size: int, tokens: int) -> Figure:
    formula = "tokens x bytes x (2 d + the most of: experts' rows, dense block, attention) + last logits"
    note = "moekit's own forward pass without gradients"
    return Figure(f"working_set.{key}", label, size, "B", formula, f"{tokens:,} tokens", note)


def _expanded(layers: list[Attention], kv: Format) -> list[Figure]:
    if not any(a.latent for a in layers):
        return []
    return [
        Figure(
            "expanded_bytes_per_token",
            "as whole keys and values, each token",
            sum(kv.bytes_of((a.expanded,), a.layers) for a in layers),
            "B",
            "sum over layers of heads (d_qk + d_v) x bytes",
            _in_numbers((a.layers, a.expanded) for a in layers),
            "what an implementation keeps that does not keep the latent",
        )
    ]


def _against_multi_head(layers: list[Attention], kv: Format, elements: int) -> list[Figure]:
    """Multi-head attention keeps 2 heads d_head numbers for each layer (arXiv 2405.04434, Table 1)."""
    full = sum(a.layers * 2 * a.n_heads * a.v_dim for a in layers)
    if not full:
        return []
    one_group = sum(a.layers * 2 * a.v_dim for a in layers)
    return [
        Figure(
            "multi_head_bytes_per_token",
            "as multi-head attention, each token",
            sum(kv.bytes_of((2 * a.n_heads * a.v_dim,), a.layers) for a in layers),
            "B",
            "sum over layers of 2 heads d_head x bytes",
            _in_numbers((a.layers, 2 * a.n_heads * a.v_dim) for a in layers),
            "d_head is the width of a value",
        ),
        Figure(
            "saving",
            "saved against multi-head attention",
            100 * (1 - elements / full),
            "%",
            "100 (1 - kept / multi-head)",
            f"100 (1 - {elements:,} / {full:,})",
            "at equal precision",
        ),
        Figure(
            "equivalent_groups",
            "as many key-value heads of grouped queries",
            elements / one_group,
            "",
            "kept / sum over layers of 2 d_head",
            f"{elements:,} / {one_group:,}",
            "arXiv 2405.04434, Table 1: 2.25 for MLA with latent = 4 d_head, rotary = d_head / 2",
        ),
    ]


def _on_device(
    blueprint: Blueprint, precision: Precision, cache: int, training: Training | None, layout: Layout
) -> list[Figure]:
    """Bytes on the fullest device: of training where that is asked for, else of inference."""
    if training is not None:
        found = training_on_device(blueprint, training, layout)
    else:
        # A latent is not cut along heads: every device of a tensor group keeps it whole.
        latent = any(a.latent for a in blueprint.attentions)
        over = layout.data * layout.pipeline * (1 if latent else layout.tensor)
        met = [w for w in blueprint.weights if w.part != "prediction"]
        weights = sum(-(-precision.bytes_of(w) // layout.divisor(w)) for w in met)
        found = {"weights": weights, "kv_cache": -(-cache // over)}
    degrees = ", ".join(f"{key} {value}" for key, value in layout._asdict().items() if key != "zero" and value > 1)
    note = f"{degrees}, ZeRO stage {layout.zero}: {layout.devices:,} devices; the fullest one"
    formula = "experts / (expert tensor pipeline), embedding and head / tensor, norms and routers / pipeline, else both"
    figures = [
        Figure(f"device.{key}", f"each device, {key}", size, "B", formula, "", note) for key, size in found.items()
    ]
    numbers = " + ".join(f"{size:,}" for size in found.values())
    return [*figures, Figure("device.total", "each device", sum(found.values()), "B", "sum", numbers, note)]


def _in_numbers(pairs: Iterable[tuple[int, int]]) -> str:
    return " + ".join(f"{times:,} x {width:,}" for times, width in pairs)
