"""Muon (Keller Jordan 2024; arXiv 2502.16982): orthogonalised momentum, for stacks of matrices at once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from moekit.tensors import Float, Tensor
from moekit.tensors.memory import in_huge_pages

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic Newton-Schulz iteration: the steepest slope at zero that still keeps singular values near 1."""


class Muon(Optimizer):
    """torch.optim.Muon takes plain matrices only; this takes [..., out, in], each matrix on its own, in one batch.

    The update has the root mean square of AdamW's (0.2 sqrt(max(out, in)), arXiv 2502.16982, section 2.2), so that both
    share learning rate and decay. A parameter of a group with `parts = 2` holds two matrices above each other (gate
    and up), which are orthogonalised apart. `dtype` is that of the iteration, which needs few digits.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps, "parts": 1}
        super().__init__(params, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient, which is taken `factor` times."""
        batches: dict[tuple[int, ...], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._momentum(parameter, parameter.grad, group, factor)
                    width, height = sorted(update.shape[-2:])
                    batches.setdefault((width, height, group["steps"]), []).append((parameter, update, group))
        for (*_, steps), entries in batches.items():
            self._move(entries, steps)

    def _momentum(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], factor: float
    ) -> Float[Tensor, "N out in"]:
        """Nesterov momentum of the gradient, as matrices to orthogonalise."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = in_huge_pages(parameter).zero_()
        momentum, share = state["momentum"], group["momentum"]
        gradient = gradient.to(momentum.dtype)
        gradient = gradient if factor == 1 else gradient * factor
        momentum.lerp_(gradient, 1 - share)
        update = gradient.lerp(momentum, share).to(self.dtype)
        rows = parameter.shape[-2] // group["parts"]
        return update.view(-1, rows, parameter.shape[-1])

    def _move(self, entries: list[tuple[Tensor, Tensor, dict[str, Any]]], steps: int) -> None:
        wide = [u if u.shape[-2] <= u.shape[-1] else u.mT for _, u, _ in entries]
        flat = torch.cat(wide)
        orthogonal = orthogonalise(flat, steps).split([u.shape[0] for _, u, _ in entries])
        for (parameter, update, group), part in zip(entries, orthogonal, strict=True):
            move = part if update.shape[-2] <= update.shape[-1] else part.mT
            factor = 0.2 * max(update.shape[-2:]) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(move.reshape(parameter.shape), alpha=-group["lr"] * factor)


def orthogonalise(x: Float[Tensor, "N short long"], steps: int) -> Float[Tensor, "N short long"]:
    """Each matrix with its singular values near 1: `steps` rounds of Newton-Schulz."""
    a, b, c = COEFFICIENTS
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
