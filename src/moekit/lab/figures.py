"""What one run of a lab is measured by: loss on held-out text, balance of the experts, speed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from moekit.analyze.domains import trace
from moekit.model.mode import evaluation_mode
from moekit.moe.stats import dead_experts, entropy, max_violation
from moekit.train.loop import Run
from moekit.train.metrics import METRICS, read_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """The figures of one run; None where a model without mixture-of-experts layers has none.

    Those of training are means over the layers and the last quarter of the steps. The others are of the load of the
    whole validation text, before any token is dropped: means over the layers, and the number of dead experts in all.
    """

    loss: float
    """nats per token of validation text, mean over the domains"""
    bits_per_byte: float
    max_violation: float | None
    """of a training step (MaxVio_batch, arXiv 2408.15664)"""
    max_violation_global: float | None
    entropy: float | None
    """of the load, 1 where all experts work equally"""
    dead_experts: int | None
    """which no token of the validation text uses"""
    drop_rate: float | None
    """share of the places dropped in training"""
    experts_per_token: float | None
    """that serve a token in training"""
    tokens_per_s: float
    """of the median step"""
    domains: Mapping[str, Mapping[str, float]]
    """loss and bits per byte of each"""


def measure(run: Run) -> RunFigures:
    """The figures of a run at its last step."""
    rows = read_metrics(run.folder / METRICS)
    validation = run.progress.validation
    return RunFigures(
        loss=fmean(found["loss"] for found in validation.values()),
        bits_per_byte=fmean(found["bits_per_byte"] for found in validation.values()),
        max_violation=late_mean(rows, "max_violation"),
        drop_rate=late_mean(rows, "drop_rate"),
        experts_per_token=late_mean(rows, "experts_per_token"),
        tokens_per_s=median(row["tokens_per_s"] for row in rows),
        domains=validation,
        **_balance(validation_load(run)),
    )


def late_mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a figure over the layers and the last quarter of the steps, one step at least."""
    late = rows[-max(len(rows) // 4, 1) :]
    values = [layer[key] for row in late for layer in row["layers"]]
    return round(fmean(values), 6) if values else None


def validation_load(run: Run) -> torch.Tensor:
    """How many places each expert of each layer [L E] got from all validation text, cut into whole sequences."""
    model = run.stepper.model
    texts: Iterable[tuple[str, np.ndarray]] = ((domain.name, domain.valid) for domain in run.corpus.domains)
    tokens = {name: ids.astype(np.int64) for name, ids in texts}
    if not model.config.moe_layers:
        return torch.zeros(0, 0)
    with evaluation_mode(model):
        traced = trace(model, tokens, run.config.data.sequence_length, max(map(len, tokens.values())), batch=16)
    return torch.from_numpy(traced.counts.sum(axis=0))


def _balance(load: torch.Tensor) -> dict[str, Any]:
    if not len(load):
        return {"max_violation_global": None, "entropy": None, "dead_experts": None}
    return {
        "max_violation_global": round(max_violation(load).mean().item(), 6),
        "entropy": round(entropy(load).mean().item(), 6),
        "dead_experts": int(dead_experts(load).sum()),
    }
