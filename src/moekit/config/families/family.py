"""What a model family of the hub is: two translations of `config.json`, and the names of the tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moekit.config.model import ModelConfig

Names = Mapping[str, str | tuple[str, ...]]
"""Our tensor to the hub's. `{expert}` goes along the first dimension; several names share the rows of one tensor
evenly, in order."""


class Family(NamedTuple):
    """How a family writes a configuration and names its tensors.

    `to_hub` gives None for what the family cannot express; what it writes and `from_hub` reads as another model is not
    expressed either. `names` is None where the hub's names are ours. `copies` are tensors that only repeat another of
    ours, `zeros` those that other readers want and that hold nothing but zeros, `idle` those of them that may hold
    anything, since nothing comes of it.
    """

    model_type: str
    to_hub: Callable[[ModelConfig], dict[str, Any] | None]
    from_hub: Callable[[Mapping[str, Any]], ModelConfig]
    names: Callable[[ModelConfig], Names | None]
    copies: Callable[[ModelConfig], Mapping[str, str]] = lambda _: {}
    zeros: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]] = lambda _: {}
    idle: Callable[[ModelConfig], frozenset[str]] = lambda _: frozenset()

    def blank(self, config: ModelConfig) -> set[str]:
        """The tensors that must hold zeros where a file has them: what else they held would be lost."""
        return self.zeros(config).keys() - self.idle(config)
