"""The parts of a model, and how many of its parameters each holds."""

from typing import NamedTuple

from moekit.model.transformer import Transformer

PARTS = (
    ("mtp.", "prediction module"),
    ("norm.", "norms"),
    ("embedding.", "embedding"),
    ("head.", "head"),
    (".attention.", "attention"),
    (".router.", "router"),
    (".balance.", "router"),
    (".shared", "shared experts"),
    (".experts.", "routed experts"),
    (".feed_forward.", "dense feed-forward"),
)
"""What the name of one of our tensors contains, and the part of the model that it belongs to; the first one counts."""


class Count(NamedTuple):
    """Parameters of a part of the model: all, and those that compute one token."""

    total: int
    active: int


def part_of(name: str) -> str:
    """The part of the model that our tensor `name` belongs to."""
    return next(part for words, part in PARTS if words in name)


def parts(model: Transformer) -> dict[str, Count]:
    """The parameters of each part, by shapes alone; the sums are those of `Transformer.size`."""
    counts = {part: Count(0, 0) for _, part in PARTS}
    moe = model.config.moe
    for name, parameter in model.named_parameters():
        part, total = part_of(name), parameter.numel()
        shares = {"prediction module": 0, "routed experts": total * moe.active_experts // moe.n_routed}
        counts[part] = Count(counts[part].total + total, counts[part].active + shares.get(part, total))
    order = sorted(counts.items(), key=lambda item: -item[1].total)
    return {part: count for part, count in order if count.total}
