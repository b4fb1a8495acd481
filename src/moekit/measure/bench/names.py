"""The names of the works by kind; known without torch."""

from collections.abc import Iterable
from types import MappingProxyType

KINDS = MappingProxyType(
    {
        "train": ("layer-train", "layer-train-routing", "model-train", "experts-train"),
        "prefill": ("layer-prefill", "layer-prefill-int4", "model-prefill-int4"),
        "decode": ("layer-decode", "layer-decode-int4", "model-decode-int4", "experts-decode", "generate-start-int4"),
    }
)

ALL = tuple(name for names in KINDS.values() for name in names)


def named(wanted: Iterable[str]) -> tuple[str, ...]:
    """The works of these kinds and names, in their order and each once; all for "all". KeyError for an unknown one."""
    groups = {**KINDS, "all": ALL, **{name: (name,) for name in ALL}}
    found = {name for each in wanted for name in groups[each]}
    return tuple(name for name in ALL if name in found)
