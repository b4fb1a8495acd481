"""Random routings and layers that several tests of the layer share."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.moe.experts import Experts
from moekit.moe.layer import MoE
from moekit.moe.routing import Routing
from moekit.moe.selection import Selection, Tokens
from moekit.moe.selection.top_k import select_top_k

seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def randomise(module: nn.Module, seed: int, std: float = 0.5) -> None:
    """Weights large enough that experts differ and routers decide."""
    source = generator(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.normal_(0.0, std, generator=source)


def random_layer(seed: int, dtype: torch.dtype = torch.float32, **settings: Any) -> MoE:
    layer = MoE(MoEConfig(**settings))
    randomise(layer, seed)
    return layer.to(dtype)


class Decided(NamedTuple):
    """Tokens, an expert block, and a routing of the tokens that no router needs to have made."""

    x: Tensor
    experts: Experts
    routing: Routing


class Shape(NamedTuple):
    """Sizes and oddities of a decided routing."""

    seed: int
    n_tokens: int
    n_experts: int
    top_k: int
    width: int
    expert_width: int
    pattern: str
    drops: bool


def widths() -> st.SearchStrategy[int]:
    """Small ones for the plain paths, and multiples of 16 for the compiled ones."""
    return st.one_of(st.integers(1, 9), st.sampled_from([16, 48]))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    n_experts = draw(st.integers(1, 6))
    return Shape(
        seed=draw(seeds),
        n_tokens=draw(st.sampled_from([0, 1, 2, 5, 12, 70])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        width=draw(widths()),
        expert_width=draw(widths()),
        pattern=draw(st.sampled_from(["any", "same_for_all", "with_holes", "all_empty"])),
        drops=draw(st.booleans()),
    )


def decide(shape: Shape, dtype: torch.dtype = torch.float32) -> Decided:
    source = generator(shape.seed)
    places = (shape.n_tokens, shape.top_k)
    order = torch.rand(shape.n_tokens, shape.n_experts, generator=source).argsort(dim=-1)
    if shape.pattern == "same_for_all" and shape.n_tokens:
        order = order[:1].expand(shape.n_tokens, -1)
    experts = order[:, : shape.top_k].contiguous()
    if shape.pattern == "with_holes":
        experts = experts.masked_fill(torch.rand(places, generator=source) < 0.4, -1)
    elif shape.pattern == "all_empty":
        experts = torch.full_like(experts, -1)
    scores = torch.rand(shape.n_tokens, shape.n_experts, generator=source).to(dtype)
    weights = torch.rand(places, generator=source).to(torch.float64 if dtype == torch.float64 else torch.float32)
    served = experts.masked_fill(torch.rand(places, generator=source) >= 0.6, -1) if shape.drops else None
    block = Experts(shape.n_experts, shape.width, shape.expert_width)
    randomise(block, shape.seed)
    x = torch.randn(shape.n_tokens, shape.width, generator=source).to(dtype)
    return Decided(x, block.to(dtype), Routing(experts, weights, scores, scores.logit(), served=served))


def select(rule: TopKRouting, top_k: int, logits: Tensor, bias: Tensor | None = None) -> Selection:
    """What top-k routing makes of these logits."""
    return select_top_k(rule, top_k, logits, Tokens(logits, bias))


def routing_of(
    logits: Tensor,
    top_k: int,
    n_sequences: int = 1,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **settings: Any,
) -> Routing:
    """The routing that these logits lead to, differentiable in them, in their own precision."""
    found = select(TopKRouting(**settings), top_k, logits, bias)
    return Routing(found.experts, found.weights, found.scores, logits, n_sequences, mask=mask)
