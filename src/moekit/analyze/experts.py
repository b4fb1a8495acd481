"""The experts' chapter of a report, from a trace."""

import numpy as np
import torch

from moekit.analyze.domains import DomainTrace
from moekit.analyze.specialisation import specialisation
from moekit.moe.stats import dead_experts, entropy, max_violation
from moekit.report.values import ExpertLayer, ExpertUse


def expert_use(trace: DomainTrace, permutations: int = 20, seed: int = 0) -> ExpertUse:
    """Load, balance and specialisation of every layer over all traced tokens."""
    special = specialisation(trace, permutations, seed)
    load = trace.counts.sum(axis=0)
    counted = torch.from_numpy(load)
    violation, even, dead = (statistic(counted).tolist() for statistic in (max_violation, entropy, dead_experts))
    chance = special.shuffled
    layers = tuple(
        ExpertLayer(
            layer=layer,
            load=tuple(load[i].tolist()),
            max_violation=violation[i],
            entropy=even[i],
            dead_experts=dead[i],
            share=tuple(tuple(row) for row in special.share[:, i].tolist()),
            divergence=float(special.divergence[i]),
            pairwise=tuple(tuple(row) for row in special.pairwise[i].tolist()),
            shuffled_mean=float(chance[:, i].mean()) if permutations else float("nan"),
            shuffled_p95=float(np.quantile(chance[:, i], 0.95)) if permutations else float("nan"),
        )
        for i, layer in enumerate(trace.layers)
    )
    return ExpertUse(
        domains=trace.domains,
        tokens=tuple(trace.tokens.tolist()),
        uniform_share=special.uniform,
        permutations=permutations,
        layers=layers,
    )
