"""AdamW (arXiv 1711.05101) of all tensors in one pass, which rounds them for a model that computes in bfloat16."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from moekit.kernels.adamw import Move, Rule, adamw
from moekit.tensors import Tensor
from moekit.tensors.memory import in_huge_pages


class AdamW(Optimizer):
    """torch.optim.AdamW's formula and state, for float32 parameters whose gradients may be bfloat16.

    `copies` maps the identity of a parameter to the tensor that its rounding is written into.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        epsilon: float,
        copies: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})
        self.betas, self.epsilon = betas, epsilon
        self.copies = copies or {}

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient, which is taken `factor` times."""
        moves = [
            self._move(parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        adamw(moves, Rule(*self.betas, self.epsilon, factor))

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Move:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = in_huge_pages(parameter).zero_(), in_huge_pages(parameter).zero_()
        state["step"] += 1
        means, number = (state["exp_avg"], state["exp_avg_sq"]), int(state["step"].item())
        copy = self.copies.get(id(parameter))
        return Move(parameter, *means, gradient, number, group["lr"], group["weight_decay"], copy)
