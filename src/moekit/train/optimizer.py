"""Which optimizer moves which tensor, and how fast at each step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from moekit.config.run import OptimConfig
from moekit.tensors import Tensor
from moekit.train.muon import Muon
from moekit.train.precision import compute_dtype


class Optimizers:
    """The optimizers of a run as one: matrices go to Muon (if chosen), all else to AdamW."""

    def __init__(self, config: OptimConfig, parameters: Mapping[str, Tensor]) -> None:
        self.config = config
        self.names = list(parameters)
        rest = dict(parameters)
        self.parts: list[Optimizer] = []
        if config.kind == "muon":
            groups = muon_groups(parameters)
            for group in groups:
                for name in group["names"]:
                    rest.pop(name)
            dtype = compute_dtype("auto", next(iter(parameters.values())).device.type)
            self.parts.append(Muon(groups, config.lr, config.momentum, config.weight_decay, dtype=dtype))
        decayed = [p for p in rest.values() if p.dim() > 1]
        plain = [p for p in rest.values() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        lr = config.adam_lr if config.kind == "muon" else config.lr
        betas = (config.beta1, config.beta2)
        self.parts.append(torch.optim.AdamW([g for g in groups if g["params"]], lr, betas, eps=1e-10, fused=True))
        self.peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        """Move every parameter at `factor` times the peak learning rate."""
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()


def muon_groups(parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The matrices between tokens and logits: all but embedding, head and router, whose rows are used one by one."""
    own = ("embedding.weight", "head.weight", "router.centroids", "shared_gate.weight")
    matrices = {name: p for name, p in parameters.items() if p.dim() > 1 and not name.endswith(own)}
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
