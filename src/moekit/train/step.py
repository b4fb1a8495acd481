"""One optimizer step: gradients of all micro-batches, a guard, a move, the balance of the experts."""

import math
from typing import NamedTuple

import torch

from moekit.config.run import RunConfig
from moekit.kernels.adamw import norm
from moekit.model.block import Block
from moekit.model.fp8 import round_activations, weight_roundings
from moekit.model.transformer import Transformer
from moekit.moe.stats import Observed
from moekit.tensors import Int, Tensor
from moekit.train.objective import Rows, count_step, objective
from moekit.train.optimizer import Optimizers, frozen
from moekit.train.precision import MasterWeights, compute_dtype


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer a finite number."""


class StepFigures(NamedTuple):
    """What a step measured: terms of the loss, norm of the gradient, learning rate, and what each MoE layer saw."""

    losses: dict[str, float]
    gradient_norm: float
    learning_rate: float
    observed: list[Observed]


class Stepper:
    """A model with its optimizer. `gradients` and `step` are apart, so that gradients can be looked at.

    With `train.fp8` the model computes as if in FP8 from here on, in validation too; master weights are not rounded.
    """

    def __init__(self, config: RunConfig, model: Transformer) -> None:
        self.config = config
        self.model = model.train()
        roundings = weight_roundings(model) if config.train.fp8 else {}
        self.weights = MasterWeights(model, compute_dtype(config.train.dtype, config.device), roundings)
        if config.train.fp8:
            round_activations(model)
        self.optimizers = Optimizers(config.optim, self.weights.masters, self.weights.copies())

    def gradients(
        self, ids: Int[Tensor, "B W"], tasks: Int[Tensor, " B"] | None = None, number: int = 0
    ) -> StepFigures:
        """Leave the gradient of the step's objective in the master weights. `ids` has two tokens more than predicted.

        It does not depend on how the batch is cut into micro-batches, but where routing by its nature does: by chance,
        by capacities, or by a choice among the tokens of a forward pass. `tasks` are the rows' tasks, `number` is that
        of the step, which chance depends on, and what is frozen; that has no gradient.
        """
        parts = self._parts(ids, tasks, number)
        counts = count_step(self.model, parts)
        losses: dict[str, float] = {}
        observed: list[Observed] = []
        for part in parts:
            result = objective(self.model, part, self.config.train.mtp_weight, len(part.ids) / len(ids), counts)
            result.loss.backward()
            self.weights.collect()
            for name, term in result.terms.items():
                losses[name] = losses.get(name, 0.0) + term.item()
            layers = zip(self.model.moe_layers(), result.routings, strict=True)
            seen = [layer.observe(routing) for layer, routing in layers]
            observed = [a + b for a, b in zip(observed, seen, strict=True)] if observed else seen
        for name in frozen(self.config.optim, number, self.weights.masters):
            self.weights.masters[name].grad = None
        found = [p.grad for p in self.weights.masters.values() if p.grad is not None]
        return StepFigures(losses, norm(found), 0.0, observed)

    def _parts(self, ids: Int[Tensor, "B W"], tasks: Int[Tensor, " B"] | None, number: int) -> list[Rows]:
        size = self.config.train.micro_batch or len(ids)
        pieces = ids.split(size)
        owners = [None] * len(pieces) if tasks is None else tasks.split(size)
        # One number for each run, step and micro-batch, so that a resumed run draws what the other would have drawn.
        seeds = torch.Generator().manual_seed((self.config.seed * 1_000_003 + number) % 2**63)
        numbers = torch.randint(2**62, (len(pieces),), generator=seeds).tolist()
        return [Rows(*part) for part in zip(pieces, owners, numbers, strict=True)]

    def step(self, ids: Int[Tensor, "B W"], number: int, tasks: Int[Tensor, " B"] | None = None) -> StepFigures:
        """Do step `number` (from 0). Raises DivergedError, with the weights as they were, if a number is not finite."""
        figures = self.gradients(ids, tasks, number)
        if not all(map(math.isfinite, (*figures.losses.values(), figures.gradient_norm))):
            raise DivergedError(f"step {number + 1}: {self._culprit(ids, tasks)} is not finite")
        clip = self.config.optim.clip
        shortened = min(clip / (figures.gradient_norm + 1e-6), 1.0) if clip else 1.0
        factor = self.optimizers.step(number, self.config.train.steps, shortened)
        self.weights.publish(self.optimizers.rounded)
        self.weights.clear()
        for layer, observed in zip(self.model.moe_layers(), figures.observed, strict=True):
            layer.after_step(observed)
        return figures._replace(learning_rate=self.config.optim.lr * factor)

    def _culprit(self, ids: Tensor, tasks: Tensor | None) -> str:
        """Where the first number went wrong: forward from the embedding, else backward from the loss."""
        bad = first_bad_block(self.model, ids[:, :-2], tasks)
        if bad is not None:
            return f"the output of {bad}"
        names = [name for name, p in self.weights.masters.items() if p.grad is not None and not p.grad.isfinite().all()]
        return f"the gradient of {names[-1]}" if names else "the loss"


@torch.no_grad()
def first_bad_block(model: Transformer, ids: Int[Tensor, "B S"], tasks: Int[Tensor, " B"] | None = None) -> str | None:
    """The first layer whose output holds a number that is not finite."""
    bad: list[str] = []

    def look(name: str, x: Tensor) -> None:
        if not x.isfinite().all():
            bad.append(name)

    blocks = [(f"layer {n}", m) for n, m in enumerate(model.layers) if isinstance(m, Block)]
    hooks = [m.register_forward_hook(lambda *a, name=name: look(name, a[2].x)) for name, m in blocks]
    hooks.append(model.embedding.register_forward_hook(lambda *a: look("the embedding", a[2])))
    try:
        model.hidden(ids, tasks=tasks)
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
