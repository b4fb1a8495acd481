"""How a model is spread over devices, and which degree of it divides which part."""

from typing import NamedTuple

from moekit.config.errors import ConfigError
from moekit.plan.blueprint import Weight


class Layout(NamedTuple):
    """Degrees of parallelism.

    Experts are spread over copies of the dense parts, so that `data` and `expert` share devices: one must divide the
    other. `zero` (arXiv 1910.02054) spreads over copies: 1 the optimizer's state, 2 gradients too, 3 weights too.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 0

    @property
    def devices(self) -> int:
        """Devices in all."""
        return max(self.data, self.expert) * self.tensor * self.pipeline

    def check(self) -> None:
        """Raise a ConfigError that names the degree which cannot be."""
        for key in ("data", "expert", "tensor", "pipeline"):
            if getattr(self, key) < 1:
                raise ConfigError(key, f"{getattr(self, key)} must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ConfigError("zero", f"{self.zero} is not a stage", "stages are 0, 1, 2 and 3")
        if max(self.data, self.expert) % min(self.data, self.expert):
            message = f"{self.expert} and data = {self.data}: one must divide the other"
            raise ConfigError("expert", message, "experts are spread over the copies of the dense parts")

    def divisor(self, weight: Weight) -> int:
        """Over how many devices the tensors of `weight` are spread, before ZeRO.

        Embedding and head are whole in the stage that has them, norms and routers whole in each tensor group.
        """
        if is_expert(weight):
            return self.expert * self.tensor * self.pipeline
        if weight.part in ("embedding", "head"):
            return self.tensor
        if weight.part in ("norms", "router") or weight.kind == "vector":
            return self.pipeline
        return self.tensor * self.pipeline

    def copies(self, weight: Weight) -> int:
        """How many groups of devices hold the same tensors: what ZeRO spreads over."""
        groups = max(self.data, self.expert)
        return groups // self.expert if is_expert(weight) else groups


def is_expert(weight: Weight) -> bool:
    """Whether `weight` are routed experts, those of a prediction module included."""
    return weight.part == "routed" or (weight.part == "prediction" and weight.name.startswith("experts"))
