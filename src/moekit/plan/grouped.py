"""The blueprint of a folder that `moekit quantize` wrote."""

from collections.abc import Mapping

from moekit.config.quantisation import Groups
from moekit.plan.blueprint import Blueprint, Part, Weight

PARTS: Mapping[str, Part] = {
    "attention": "attention",
    "dense feed-forward": "dense",
    "shared experts": "shared",
    "routed experts": "routed",
    "prediction module": "prediction",
    "head": "head",
}
"""Parts that can be kept, and what they are called here."""


def in_groups(blueprint: Blueprint, groups: Groups) -> Blueprint:
    """The same shape with its weights in groups: the head too, but not what the folder keeps as it was."""
    kept = {PARTS[pattern] for pattern in groups.kept if pattern in PARTS}
    weights = tuple(
        weight._replace(blocks=_fits(weight, groups) and weight.part not in kept) for weight in blueprint.weights
    )
    others = [pattern for pattern in groups.kept if pattern not in PARTS]
    note = f"tensors kept in bfloat16 by pattern are counted in {groups.name}: {', '.join(others)}"
    notes = (*blueprint.notes, note) if others else blueprint.notes
    return blueprint._replace(weights=weights, quantisation=groups.name, notes=notes)


def _fits(weight: Weight, groups: Groups) -> bool:
    """Whether the tensors are quantised: whole groups make up their rows, and those of the experts' other matrix."""
    if weight.kind != "product" or weight.name == "kv_b" or not (weight.blocks or weight.part == "head"):
        return False
    sides = weight.shape if weight.name.startswith("experts, ") else weight.shape[-1:]
    return all(side % groups.size == 0 for side in sides)
