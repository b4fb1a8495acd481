"""Every selection rule of the configuration, in every variant, as the tests of its promises need it."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from routing_cases import generator, randomise
from torch import Tensor

from moekit.config.errors import ConfigError
from moekit.config.moe import MoEConfig
from moekit.config.routing import Routing
from moekit.moe.layer import MoE, MoEOutput

N_EXPERTS, WIDTH, VOCABULARY = 8, 6, 50
SETTINGS = {"vocab_size": VOCABULARY, "n_groups": 4, "top_k_groups": 2}
"""What a rule is tested with where it has such a field; all else is as its author chose."""


class Case(NamedTuple):
    cls: type
    settings: dict[str, Any]

    def name(self) -> str:
        values = [str(value) for key, value in self.settings.items() if key not in SETTINGS]
        return "-".join([self.rule().kind, *values])

    def rule(self) -> Any:
        return self.cls(**self.settings)

    def config(self, **settings: Any) -> MoEConfig:
        """A layer with two experts a token, or one where the rule wants that."""
        base = {"width": WIDTH, "expert_width": 4, "n_routed": N_EXPERTS, "n_shared": 0, "routing": self.rule()}
        try:
            return MoEConfig(**{"top_k": 2} | base | settings)
        except ConfigError as error:
            if error.key != "top_k" or "top_k" in settings:
                raise
            return MoEConfig(**{"top_k": 1} | base | settings)

    def layer(self, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> MoE:
        layer = MoE(self.config(**settings))
        randomise(layer, seed)
        return layer.to(dtype)


def variants(cls: type) -> list[Case]:
    """The rule as its author set it, and once for every other choice of a setting that offers several."""
    hints, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    fixed = {name: value for name, value in SETTINGS.items() if name in fields}
    cases = [Case(cls, fixed)]
    for name, field in fields.items():
        if name != "kind" and get_origin(hints[name]) is Literal:
            cases += [Case(cls, fixed | {name: choice}) for choice in get_args(hints[name]) if choice != field.default]
    return cases


CASES = [case for cls in get_args(Routing) for case in variants(cls)]


class Batch(NamedTuple):
    """Tokens [B S D] with their ids and tasks."""

    x: Tensor
    ids: Tensor
    tasks: Tensor


def batch(seed: int, n_sequences: int = 3, length: int = 5, dtype: torch.dtype = torch.float32) -> Batch:
    source = generator(seed)
    x = torch.randn(n_sequences, length, WIDTH, generator=source).to(dtype)
    ids = torch.randint(0, VOCABULARY, (n_sequences, length), generator=source)
    return Batch(x, ids, torch.zeros(n_sequences, dtype=torch.long))


def run(layer: MoE, given: Batch, mask: Tensor | None = None, seed: int = 0) -> MoEOutput:
    return layer(given.x, mask, given.ids, given.tasks, generator(seed))


def trained(layer: MoE, steps: int = 3) -> MoE:
    """The layer after some optimizer steps' observations, so that rules with state have one."""
    layer.train()
    with torch.no_grad():
        for step in range(steps):
            layer.after_step(layer.observe(run(layer, batch(100 + step, 4, 8), seed=step).routing))
    return layer
