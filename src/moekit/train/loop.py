"""The run: steps, validation, checkpoints, and going on after a stop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from moekit.checkpoint.folder import WEIGHTS
from moekit.checkpoint.load import load
from moekit.config.codec import to_dict
from moekit.config.run import RunConfig
from moekit.data.batches import Batches, id_shares
from moekit.data.corpus import Corpus
from moekit.data.tokenizer import end_of_text
from moekit.evaluate.loss import routes_by_task
from moekit.evaluate.text import evaluate_tokens
from moekit.model.transformer import Transformer
from moekit.moe.selection.hash import Rule as HashRule
from moekit.train import state
from moekit.train.metrics import MetricsFile, TensorBoard, layer_figures, round_figure
from moekit.train.step import StepFigures, Stepper

LOOKAHEAD = 2
"""Tokens a training row holds beyond those it predicts: the next one, and the one after it."""


@runtime_checkable
class Watcher(Protocol):
    """Who looks on: the command line's progress bar, or nobody."""

    def stepped(self, row: dict[str, Any]) -> None:
        """A step ended; `row` is its line of metrics.jsonl."""
        ...

    def stopping(self) -> bool:
        """Whether to save and stop after this step."""
        ...


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    best_step: int = 0
    best: float = float("inf")
    validation: dict[str, dict[str, float]] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """As JSON holds it."""
        best = None if self.best == float("inf") else self.best
        return {"step": self.step, "best_step": self.best_step, "best": best, "validation": self.validation}


class Run:
    """A training run in the folder `folder`. `resume` takes up the newest checkpoint; without one it begins anew."""

    def __init__(self, config: RunConfig, corpus: Corpus, folder: Path, resume: bool) -> None:
        self.config, self.corpus, self.folder = config, corpus, folder
        self.progress = Progress()
        length = config.data.sequence_length
        self.batches = Batches(corpus.domains, length, config.train.batch, config.seed, extra=LOOKAHEAD)
        steps = state.saved_steps(folder) if resume else []
        if steps:
            self._restore(state.checkpoint_folder(folder, steps[-1]))
        else:
            self.stepper = Stepper(config, _new_model(config, corpus))
        # Not before the checkpoint has proved to be sound and of this run.
        state.start_folder(folder, to_dict(config), config.model, corpus)
        self.metrics = MetricsFile(folder)
        self.metrics.cut_after(self.progress.step)
        self.layers = _layer_numbers(config)
        self.checkpoints = state.Checkpoints(folder, config.model, corpus.tokenizer, config.train.keep)

    def train(self, watcher: Watcher) -> bool:
        """Go on to the last step; False if the watcher stopped the run before. Both leave a checkpoint."""
        board = TensorBoard(self.folder, self.progress.step + 1) if self.config.train.tensorboard else None
        while self.progress.step < self.config.train.steps:
            row = self._step()
            self.metrics.append(row)
            if board is not None:
                board.append(row)
            watcher.stepped(row)
            stopping = watcher.stopping()
            if (
                stopping
                or self._due(self.config.train.checkpoint_every)
                or self.progress.best_step == self.progress.step
            ):
                self.save()
            if stopping:
                break
        if board is not None:
            board.close()
        return self.progress.step == self.config.train.steps

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        stepper = self.stepper
        names = {id(p): name for name, p in stepper.weights.masters.items()}
        tensors = state.optimizer_tensors(stepper.optimizers.parts, names)
        values = {**self.progress.values(), "data": self.batches.position()}
        return self.checkpoints.save(self.progress.step, stepper.weights.state(stepper.model), tensors, values)

    def _step(self) -> dict[str, Any]:
        start = time.perf_counter()
        ids, domains = (part.to(self.config.device) for part in self.batches.next())
        tasks = domains if routes_by_task(self.config.model) else None
        figures = self.stepper.step(ids, self.progress.step, tasks)
        seconds = time.perf_counter() - start
        self.progress.step += 1
        row = self._row(figures, seconds)
        if self._due(self.config.train.validate_every):
            row["validation"] = self._validate()
        return row

    def _row(self, figures: StepFigures, seconds: float) -> dict[str, Any]:
        tokens = self.config.train.batch * self.config.data.sequence_length
        return {
            "step": self.progress.step,
            "loss": round_figure(figures.losses["next_token"]),
            "losses": {name: round_figure(value) for name, value in figures.losses.items()},
            "lr": round_figure(figures.learning_rate),
            "gradient_norm": round_figure(figures.gradient_norm),
            "tokens": self.progress.step * tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "layers": layer_figures(self.layers, figures.observed),
        }

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.config.train.steps

    def _validate(self) -> dict[str, dict[str, float]]:
        """Loss and bits per byte by domain; remembers whether this is the best so far."""
        results = validate(self.stepper.model, self.corpus, self.config.data.sequence_length)
        mean = sum(figures["bits_per_byte"] for figures in results.values()) / len(results)
        if mean < self.progress.best:
            self.progress.best, self.progress.best_step = mean, self.progress.step
        self.progress.validation = results
        return results

    def _restore(self, path: Path) -> None:
        tensors, values = state.read_state(path)
        self.progress = Progress(
            step=values["step"],
            best_step=values["best_step"],
            best=float("inf") if values["best"] is None else values["best"],
            validation=values["validation"],
        )
        model = load(path, dtype=torch.float32, device=self.config.device)
        self.stepper = Stepper(self.config, model)
        state.restore_optimizers(self.stepper.optimizers.parts, self.stepper.weights.masters, tensors)
        self.batches.restore(values["data"])
        # The run may have been killed after it wrote the checkpoint and before the folder showed its weights.
        state.publish(path / WEIGHTS, self.folder / WEIGHTS)


def validate(
    model: Transformer, corpus: Corpus, sequence_length: int, on_tokens: Callable[[int], None] | None = None
) -> dict[str, dict[str, float]]:
    """Loss in nats per token and bits per byte of each domain's validation text.

    Where the model routes by task, the domain's number is its task.
    """
    start = end_of_text(corpus.tokenizer)
    results = {}
    for number, domain in enumerate(corpus.domains):
        task = number if routes_by_task(model.config) else None
        shape = (sequence_length, sequence_length, 16)
        found = evaluate_tokens(
            model, domain.valid, len(domain.valid_text.encode()), start, *shape, on_tokens=on_tokens, task=task
        )
        results[domain.name] = {"loss": round(found.loss, 5), "bits_per_byte": round(found.bits_per_byte, 5)}
    return results


def _new_model(config: RunConfig, corpus: Corpus) -> Transformer:
    """A model at its start; balanced hash tables are filled by the training text."""
    generator = torch.Generator().manual_seed(config.seed)
    model = Transformer(config.model, generator)
    tables = [layer.router.rule for layer in model.moe_layers() if isinstance(layer.router.rule, HashRule)]
    for rule in tables:
        if rule.rule.table == "balanced":
            rule.fill(torch.from_numpy(id_shares(corpus.domains, config.model.vocab_size)))
    return model.to(config.device)


def _layer_numbers(config: RunConfig) -> list[int]:
    """The number of each MoE layer; the prediction module counts as the layer after the last."""
    model = config.model
    return [*model.moe_layers, *([model.n_layers] if model.mtp_depth and model.moe_layers else [])]
