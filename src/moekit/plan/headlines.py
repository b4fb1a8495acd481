"""Which figures a reader wants first; the others explain them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moekit.plan.figure import Figure, Section
from moekit.plan.words import labelled

HEADLINES: Mapping[str, tuple[str, ...]] = {
    "parameters": (
        "stored.total",
        "stored.without_prediction",
        "active.all",
        "active.without_input_embedding",
        "active.without_embeddings",
        "active.share",
        "per_expert",
        "combinations",
        "combinations_within_groups",
    ),
    "kv_cache": ("bytes_per_token", "total", "saving"),
    "memory": ("weights.total", "kv_cache", "working_set.prompt", "total", "training.total", "device.total"),
    "compute": ("forward.per_token", "decode.per_token", "training.per_token", "training.total"),
    "fit": (
        "needs.total",
        "usable",
        "fits",
        "breaks",
        "devices.weights_alone",
        "devices.with_cache",
        "largest_context",
        "largest_batch",
    ),
    "speed": (
        "decode.bytes_per_token",
        "decode.seconds",
        "decode.tokens_per_second",
        "decode.bound_by",
        "decode.break_even_batch",
        "prefill.seconds",
        "prefill.tokens_per_second",
        "training.tokens_per_second",
    ),
    "offload": (
        "fits",
        "missing_bytes",
        "hit_rate",
        "bytes_per_token.disk",
        "tokens_per_second.overlapped",
        "tokens_per_second.serial",
        "bound_by",
    ),
    "parallel": (
        "experts_per_device",
        "redundant_per_device",
        "expert_bytes_per_device",
        "reach.devices_expected",
        "reach.devices_max",
        "reach.nodes_expected",
        "reach.nodes_max",
        "dispatch.bytes_per_token_across",
        "combine.bytes_per_token_across",
        "time.total_seconds",
        "hidden.visible_seconds",
        "hidden.visible_seconds_all_layers",
    ),
}
"""Keys of figures by section. Not every model has all of them."""

LONGEST = 40
"""Letters from which a value is a sentence, to be read and not tabulated."""


class Summary(NamedTuple):
    """A section in short: figures for a table, sentences, and how many figures are left out."""

    figures: tuple[Figure, ...]
    sentences: tuple[str, ...]
    others: int


def summary(section: Section) -> Summary:
    """The headlines of a section; all its figures where it has none."""
    sentences = [figure for figure in section.figures if is_sentence(figure)]
    rest = [figure for figure in section.figures if not is_sentence(figure)]
    wanted = HEADLINES.get(section.key, ())
    shown = tuple(figure for figure in rest if figure.key in wanted) or tuple(rest)
    return Summary(shown, tuple(str(figure.value) for figure in sentences), len(rest) - len(shown))


def is_sentence(figure: Figure) -> bool:
    """Whether the value is a sentence."""
    return isinstance(figure.value, str) and len(figure.value) > LONGEST


class Row(NamedTuple):
    """One figure of several models; None where a model has no such figure."""

    label: str
    figures: tuple[Figure | None, ...]


class Comparison(NamedTuple):
    """Models side by side: their names, and their headlines."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]


def side_by_side(models: Sequence[tuple[str, Sequence[Section]]]) -> Comparison:
    """The headlines of models of which the same was asked, in the order of their sections."""
    found = [
        {
            (section.key, figure.key): (label, figure)
            for section in sections
            for label, figure in labelled(section.figures)
        }
        for _, sections in models
    ]
    rows = []
    for key in dict.fromkeys(section.key for _, sections in models for section in sections):
        for headline in HEADLINES.get(key, ()):
            cells = [model.get((key, headline)) for model in found]
            label = next((cell[0] for cell in cells if cell is not None), None)
            if label is not None:
                figures = tuple(None if cell is None else cell[1] for cell in cells)
                rows.append(Row(f"{key.replace('_', ' ')}: {label}", figures))
    return Comparison(tuple(name for name, _ in models), tuple(rows))
