"""Which optimizer moves which tensor, and how fast at each step."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from moekit.config.run import OptimConfig
from moekit.tensors import Tensor
from moekit.train.adamw import AdamW
from moekit.train.muon import Muon
from moekit.train.precision import compute_dtype


class Optimizers:
    """The optimizers of a run as one: matrices go to Muon (if chosen), all else to AdamW.

    `copies` are tensors that hold roundings, by the identity of their parameter; those in `rounded` follow each step.
    """

    def __init__(
        self, config: OptimConfig, parameters: Mapping[str, Tensor], copies: Mapping[int, Tensor] | None = None
    ) -> None:
        self.config = config
        rest = dict(parameters)
        self.parts: list[Muon | AdamW] = []
        if config.kind == "muon":
            groups = muon_groups(parameters)
            for group in groups:
                for name in group["names"]:
                    rest.pop(name)
            dtype = compute_dtype("auto", next(iter(parameters.values())).device.type)
            self.parts.append(Muon(groups, config.lr, config.momentum, config.weight_decay, dtype=dtype))
        lr = config.adam_lr if config.kind == "muon" else config.lr
        betas = (config.beta1, config.beta2)
        self.parts.append(AdamW(adam_groups(rest, config, lr), betas, 1e-10, copies))
        self.rounded = {id(parameter) for parameter in rest.values()} & (copies or {}).keys()
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, number: int, steps: int, gradient_factor: float = 1.0) -> float:
        """Move every parameter that has a gradient, as fast as step `number` (from 0) of `steps` says.

        Gradients are taken `gradient_factor` times. The learning rate of all but the routers, as a share of its peak,
        is returned.
        """
        own = replace(self.config, warmup_steps=self.config.router.warmup_steps or self.config.warmup_steps)
        factor, of_routers = schedule(self.config, number, steps), schedule(own, number, steps)
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * (of_routers if group.get("routers") else factor)
            part.step(gradient_factor)
        return factor


def adam_groups(parameters: Mapping[str, Tensor], config: OptimConfig, lr: float) -> list[dict[str, Any]]:
    """The routers' tensors apart from the rest, and of each the matrices, which decay, apart from the vectors."""
    groups = []
    for routers, peak in ((False, lr), (True, config.router.lr or lr)):
        held = [p for name, p in parameters.items() if is_router(name) == routers]
        settings = {"lr": peak, "routers": routers}
        matrices, vectors = [p for p in held if p.dim() > 1], [p for p in held if p.dim() <= 1]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, **settings})
        groups.append({"params": vectors, "weight_decay": 0.0, **settings})
    return [group for group in groups if group["params"]]


def is_router(name: str) -> bool:
    """Whether the parameter decides where tokens go: centroids, or what a selection rule trains."""
    return re.search(r"(^|\.)router\.(centroids$|rule\.)", name) is not None


def frozen(config: OptimConfig, number: int, names: Iterable[str]) -> set[str]:
    """The parameters that step `number` (from 0) leaves alone: in turn routers and the matrices of routed experts.

    It follows from the number alone, so that a resumed run freezes what the other would have frozen.
    """
    if not config.alternate:
        return set()
    if number // config.alternate % 2 == 0:
        return set(filter(is_router, names))
    return {name for name in names if re.search(r"(^|\.)experts\.", name)}


def muon_groups(parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The matrices between tokens and logits: all but embedding, head and router, whose rows are used one by one."""
    own = ("embedding.weight", "head.weight", "shared_gate.weight")
    inside = [name for name in parameters if not (is_router(name) or name.endswith(own))]
    matrices = {name: parameters[name] for name in inside if parameters[name].dim() > 1}
    fused = {name for name in matrices if "gate_up" in name}
    groups = [
        {"names": sorted(fused), "parts": 2},
        {"names": sorted(matrices.keys() - fused), "parts": 1},
    ]
    return [{**group, "params": [matrices[name] for name in group["names"]]} for group in groups if group["names"]]


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) as a share of the peak."""
    warm = min(config.warmup_steps, steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "cosine":
        progress = (step - warm) / max(steps - warm, 1)
        return config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = max(round(config.decay_share * steps), 1)
    left = min((steps - step) / decay, 1.0)
    return config.final_share + (1 - config.final_share) * left
