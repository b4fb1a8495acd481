"""The shape of a model as the planner sees it: its weights in bulk, its attention, its mixtures of experts."""

import math
from typing import Literal, NamedTuple

Part = Literal["embedding", "attention", "dense", "router", "shared", "routed", "norms", "prediction", "head"]

PARTS: tuple[Part, ...] = (
    "embedding",
    "attention",
    "dense",
    "router",
    "shared",
    "routed",
    "norms",
    "prediction",
    "head",
)
"""The parts of a model in the order in which a token meets them; the prediction module is not met by generation."""


class Weight(NamedTuple):
    """Tensors of one shape: `count` are stored, `used` compute one token.

    A `product` multiplies activations, a `lookup` gives rows of itself, a `vector` is added or multiplied in place.
    `blocks` tells whether a quantised model quantises it: the matrices inside the blocks, routers excepted. A tied head
    is a product of which none is stored.
    """

    part: Part
    name: str
    shape: tuple[int, ...]
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    used: int
    kind: Literal["product", "lookup", "vector"] = "product"
    blocks: bool = True

    @property
    def numel(self) -> int:
        """Numbers in one of the tensors."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """Parameters that these tensors hold."""
        return self.numel * self.count

    @property
    def active(self) -> int:
        """Parameters among them that compute one token."""
        return self.numel * min(self.used, self.count)


class Attention(NamedTuple):
    """Layers of one kind of attention: heads, the widths of their queries with keys and of their values.

    `cached` numbers are kept for each token and layer. Where they are a latent (MLA), `expanded` is what whole keys and
    values would take, and `latent` and `rotary` are the widths of what is kept. `window` is how far back a token sees.
    """

    kind: Literal["mha", "gqa", "mqa", "mla"]
    layers: int
    n_heads: int
    n_kv_heads: int
    qk_dim: int
    v_dim: int
    cached: int
    expanded: int
    latent: int = 0
    rotary: int = 0
    window: int | None = None
    causal: bool = True


class Mixture(NamedTuple):
    """Layers of one kind of mixture: experts, how many of them a token takes, from how many of the groups.

    `expert` and `shared` are the parameters of one routed expert and of all shared experts of a layer. `pools` tell
    where a token chooses so many of so many several times; empty: once.
    """

    layers: int
    n_routed: int
    top_k: int
    expert: int
    shared: int
    n_groups: int = 1
    top_k_groups: int = 1
    pools: tuple[tuple[int, int], ...] = ()


class Blueprint(NamedTuple):
    """A model's shape. `quantisation` is how the weights are stored where the source says so ("fp8", "mxfp4")."""

    name: str
    family: str
    width: int
    vocab_size: int
    layers: int
    max_positions: int
    weights: tuple[Weight, ...]
    attentions: tuple[Attention, ...]
    mixtures: tuple[Mixture, ...]
    prediction_modules: int = 0
    quantisation: str | None = None
    notes: tuple[str, ...] = ()
