"""The figures of each step: what `metrics.jsonl` holds, one object a line."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from moekit.moe.stats import Observed, dead_experts, entropy, max_violation
from moekit.tensors import Tensor

METRICS = "metrics.jsonl"


def layer_figures(layers: Iterable[int], observed: Iterable[Observed]) -> list[dict[str, int | float]]:
    """MaxVio, normalised entropy and dead experts of each layer's load, dropped share, and experts that serve a token.

    Balance is that of the assignment before any token is dropped.
    """
    figures = []
    for layer, (load, served, tokens, _) in zip(layers, observed, strict=True):
        violation, evenness, dead, assigned = max_violation(load), entropy(load), dead_experts(load), int(load.sum())
        figures.append(
            {
                "layer": layer,
                "max_violation": round(violation.item(), 4),
                "entropy": round(evenness.item(), 5),
                "dead_experts": int(dead),
                "drop_rate": round(1 - int(served) / assigned, 5) if assigned else 0.0,
                "experts_per_token": round(int(served) / max(int(tokens), 1), 4),
            }
        )
    return figures


class MetricsFile:
    """An append-only file of steps. A row is one write, so that a killed process leaves whole lines but the last."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def cut_after(self, step: int) -> None:
        """Forget the steps after `step`, and a line that was never finished: they will be written again."""
        kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
        temporary = self.path.with_name(f".{METRICS}.writing")
        temporary.write_text("".join(kept), "utf-8")
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without an unfinished last line."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoard:
    """The same figures for TensorBoard (the extra `tensorboard`)."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self.writer = SummaryWriter(os.fspath(folder / "tensorboard"), purge_step=purge_step)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one step."""
        step = row["step"]
        for key in ("loss", "lr", "gradient_norm", "tokens_per_s"):
            self.writer.add_scalar(key, row[key], step)
        for name, value in row["losses"].items():
            self.writer.add_scalar(f"losses/{name}", value, step)
        for figures in row["layers"]:
            for key in ("max_violation", "entropy", "dead_experts"):
                self.writer.add_scalar(f"{key}/layer_{figures['layer']}", figures[key], step)
        for domain, figures in row.get("validation", {}).items():
            self.writer.add_scalar(f"bits_per_byte/{domain}", figures["bits_per_byte"], step)

    def close(self) -> None:
        """Write what is pending."""
        self.writer.close()


def round_figure(value: float | Tensor) -> float:
    """A figure with the digits that float32 holds."""
    number = value.item() if isinstance(value, torch.Tensor) else value
    return float(f"{number:.7g}")
