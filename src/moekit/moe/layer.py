"""The mixture-of-experts layer: route, dispatch, compute, combine, add the shared experts."""

import math
from operator import is_
from typing import NamedTuple

import torch
from torch import nn

from moekit.config.moe import MoEConfig
from moekit.kernels.choice import Steering
from moekit.kernels.linear import Linear, in_one_call, must_be_called
from moekit.kernels.mixture import Mixture, Shared, aimed, mixture, room_for_one
from moekit.kernels.token import run
from moekit.moe.balance import active_rules, build_balance, steering
from moekit.moe.experts import Experts, Stored
from moekit.moe.kept import Kept
from moekit.moe.router import Router
from moekit.moe.routing import Routing
from moekit.moe.stats import Observed, observe
from moekit.moe.swiglu import SwiGLU
from moekit.tensors import Bool, Float, Int, Tensor


class MoEOutput(NamedTuple):
    """What the layer adds to the residual stream, and the routing that led there."""

    y: Float[Tensor, "*shape D"]
    routing: Routing


class MoE(nn.Module):
    """A drop-in replacement for a feed-forward block (arXiv 2401.06066, eq 9, without the residual).

    `balance` maps the kind of each balancing rule to its module. Weights are drawn as in DeepSeek's models; give
    `initialise` of `moekit.model.init` for another standard deviation.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        if config.width == 0:
            raise ValueError("`width`: a layer on its own needs the width of its tokens")
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config.n_routed, config.width, config.expert_width, config.expert_dropout)
        self.shared = SwiGLU(config.width, config.shared_width) if config.n_shared else None
        self.shared_gate = Linear(config.width, 1, bias=False) if config.shared_gate else None
        self.balance = build_balance(config)
        self._kept = Kept()
        for weight in self.parameters():
            if weight.requires_grad:
                nn.init.normal_(weight, std=0.02)
        self.router.rule.start()

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        ids: Int[Tensor, "*shape"] | None = None,
        tasks: Int[Tensor, " B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> MoEOutput:
        """Tokens of any leading shape; the dimension before the last is the sequence. `mask` marks real tokens.

        Hash routing needs the token `ids`, task routing the task of each sequence. In training, noise and chance come
        from `generator` (None: torch's default).
        """
        shape = x.shape
        n_tokens = math.prod(shape[:-1])
        n_sequences = max(n_tokens // shape[-2], 1) if len(shape) > 1 and shape[-2] else 1
        mask = None if mask is None else mask.reshape(-1)
        if (found := self._in_one_call(x, n_sequences, mask)) is not None:
            return found
        tokens = x.reshape(-1, shape[-1])
        routing = self.router(
            tokens,
            *steering(self.balance),
            mask,
            n_sequences,
            None if ids is None else ids.reshape(-1),
            None if tasks is None else tasks.repeat_interleave(n_tokens // max(len(tasks), 1)),
            generator,
        )
        y = self.router.rule.combine(tokens, routing, self.experts, generator)
        return MoEOutput(self._with_shared(tokens, y, routing).view_as(x), routing)

    def observe(self, routing: Routing) -> Observed:
        """What `after_step` and the figures of a step must know of one micro-batch."""
        return observe(routing, self.router.rule.observe(routing))

    @torch.no_grad()
    def after_step(self, observed: Observed) -> None:
        """Let the balancing rules, the selection rule and the capacities follow the optimizer step that ended."""
        for _, rule in active_rules(self.balance):
            rule.after_step(observed.load)
        if observed.rule is not None:
            self.router.rule.after_step(observed.rule)
        if self.router.capacity is not None:
            self.router.capacity.after_step(observed.load, observed.tokens)

    def described(
        self, x: Float[Tensor, "*shape D"], y: Float[Tensor, "*shape D"], before: int | None = None
    ) -> Mixture | None:
        """The job of compiled code that puts what this layer makes of few tokens into `y`, or adds it, where so many
        choices come `before`; None where it would not be the same."""
        return self._described(x, y, steering(self.balance), before)

    def _described(self, x: Tensor, y: Tensor, steered: Steering, before: int | None = None) -> Mixture | None:
        router, shared, way = self.router, self.shared, self.router.rule.way()
        if way is None or must_be_called(router) or self.config.shared_average or router.limits():
            return None
        centroids, where = router.place(x.dtype), self.experts.where(x.dtype)
        places = None if shared is None else shared.places(x.dtype)
        gate = None if self.shared_gate is None else self.shared_gate.place(x.dtype)
        if centroids is None or where is None or (shared is not None and places is None):
            return None
        if self.shared_gate is not None and gate is None:
            return None
        return mixture(x, y, centroids, way, steered, where, None if places is None else Shared(*places, gate), before)

    def _in_one_call(self, x: Float[Tensor, "*shape D"], n_sequences: int, mask: Tensor | None) -> MoEOutput | None:
        """The layer's output for few tokens; None where it is not for one compiled call."""
        if not in_one_call(x, math.prod(x.shape[:-1])):
            return None
        x, steered = x.contiguous(), steering(self.balance)
        y = torch.empty_like(x)
        if (known := self._kept.known(self, x, steered)) is None:
            if (known := self._described(x, y, steered)) is None:
                return None
            # What steers the choice may be made anew each time.
            if all(map(is_, steered, steering(self.balance))):
                self._kept.keep(self, x, steered, known)
        choice = room_for_one(known.size)
        job = aimed(known.job, x, y, choice)
        while not run(job):
            read(self.experts.stored, choice.experts)
        return MoEOutput(y, Routing(*choice, n_sequences, None, mask))

    def _with_shared(self, x: Float[Tensor, "T D"], y: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = torch.sigmoid(self.shared_gate(x)) * shared
        if self.config.shared_average:
            top_k = self.config.top_k
            shared, y = shared / (top_k + 1), y * (top_k / (top_k + 1))
        if routing.served is not None and getattr(self.config.capacity, "dropped", "shared") == "residual":
            # A token whose every expert is full has the residual stream alone; one that chose none was not dropped.
            lost = (routing.served < 0).all(dim=-1) & (routing.experts >= 0).any(dim=-1)
            shared = shared.masked_fill(lost.unsqueeze(-1), 0)
        return y + shared


def read(stored: Stored | None, experts: Int[Tensor, "T K"]) -> None:
    """Bring experts into memory that a compiled call found to be on disk."""
    assert stored is not None
    for expert in set(experts.flatten().tolist()):
        stored(expert)
