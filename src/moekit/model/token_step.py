"""One new token of each of a few sequences through all blocks, in one compiled call."""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from moekit.config.model import ModelConfig
from moekit.kernels.linear import in_one_call
from moekit.kernels.mixture import Mixture, Size, chosen, room
from moekit.kernels.token import Rows, last_norm, run
from moekit.model.block import Block
from moekit.model.cache import Cache
from moekit.model.norm import RMSNorm
from moekit.model.rope import room_for_turn, turn_at
from moekit.moe.experts import Experts, Stored
from moekit.moe.layer import MoE, read
from moekit.moe.router import Router
from moekit.moe.routing import Routing
from moekit.tensors import Float, Tensor


class Program(NamedTuple):
    """A token's way through the blocks of a model, prepared once: packing it anew takes a twentieth of a token's time.

    `mixtures` tells by the place of a job which mixture it is, and what reads its experts; each makes a choice of one
    size. `hooks` are those of all modules that are passed by; whoever listens must hear. `changing` are those that do
    otherwise in training. `kept` is all that the jobs point to.
    """

    jobs: bytes
    n_jobs: int
    rows: Rows
    mixtures: dict[int, tuple[int, Stored | None]]
    size: Size
    hooks: list[dict[int, Any]]
    changing: list[nn.Module]
    rooms: list[Tensor]
    kept: list[object]

    def holds(self, cache: Cache) -> bool:
        """Whether nobody listens, nobody trains, and the past lies where it lay."""
        alone = not any(self.hooks) and not any(module.training for module in self.changing)
        return alone and all(map(is_, self.rooms, cache.rooms()))


def token_step(
    config: ModelConfig, blocks: Sequence[Block], norm: RMSNorm, x: Float[Tensor, "B S D"], cache: Cache
) -> tuple[Float[Tensor, "B S D"], tuple[Routing, ...]] | None:
    """The norm of what the blocks make of `x`, and their routings; None where it would not be the same."""
    if x.shape[1] != 1 or cache.mask is not None or not in_one_call(x, len(x)):
        return None
    key = len(x), x.dtype
    if key not in cache.programs:
        if any(_hooks(_modules(blocks, norm))):
            return None
        cache.programs[key] = prepared(config, blocks, norm, x, cache)
    program = cache.programs[key]
    if program is None or not program.holds(cache):
        return None
    rows, past = program.rows, cache.length
    rows.stream.copy_(x)
    turn_at(past, config.rope, rows.turn)
    for layer in cache.layers:
        layer.count(1)
    found = room(program.size, len(program.mixtures), torch.empty_like(x))
    choices, done = chosen(program.size, found), 0
    while (done := run(program.jobs, found, past, done)) < program.n_jobs:
        which, stored = program.mixtures[done]
        read(stored, choices[which].experts)
    assert found.states is not None
    return found.states, tuple(Routing(*choice, len(x)) for choice in choices)


def prepared(config: ModelConfig, blocks: Sequence[Block], norm: RMSNorm, x: Tensor, cache: Cache) -> Program | None:
    """The program for rows like `x`; None where compiled code would not do what the blocks do."""
    # What is made in inference mode could be written to in inference mode alone.
    with torch.inference_mode(False):
        turned = room_for_turn(config.rope, config.attention.rotary_width)
        rows = Rows(torch.empty_like(x), torch.empty_like(x), turned)
    jobs, mixtures = list[bytes](), dict[int, tuple[int, Stored | None]]()
    modules, kept, size = _modules(blocks, norm), list[object](rows), Size(len(x), 0, 0)
    for block, layer in zip(blocks, cache.layers, strict=True):
        found = block.described(rows, layer, len(mixtures))
        if found is None:
            return None
        first, second = found
        if isinstance(second, Mixture):
            assert isinstance(block.feed_forward, MoE)
            if mixtures and second.size != size:
                return None
            mixtures[len(jobs) + 1] = len(mixtures), block.feed_forward.experts.stored
            kept, size = kept + second.kept, second.size
            second = second.job
        jobs += (first, second)
    if not norm.readable(x.dtype):
        return None
    jobs.append(last_norm(rows, norm.weight, norm.epsilon))
    # A parameter that is replaced must not leave the jobs an address of nothing.
    for module in modules:
        if not (isinstance(module, Experts) and module.stored is not None):
            kept += [parameter.detach() for parameter in module.parameters(recurse=False)]
    changing: list[nn.Module] = [module for module in modules if isinstance(module, (Experts, Router))]
    packed = b"".join(jobs)
    return Program(packed, len(jobs), rows, mixtures, size, _hooks(modules), changing, cache.rooms(), kept)


def _modules(blocks: Sequence[Block], norm: RMSNorm) -> list[nn.Module]:
    return [module for each in (*blocks, norm) for module in each.modules()]


def _hooks(modules: Sequence[nn.Module]) -> list[dict[int, Any]]:
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
