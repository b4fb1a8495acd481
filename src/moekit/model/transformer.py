"""The language model: embedding, blocks, head, and the optional module that predicts a second token."""

from typing import NamedTuple, cast

import torch
from torch import nn

from moekit.config.model import ModelConfig
from moekit.kernels.linear import Linear
from moekit.model.attention import Context, visibility
from moekit.model.block import Block
from moekit.model.cache import Cache
from moekit.model.init import initialise
from moekit.model.mtp import MultiTokenPrediction
from moekit.model.norm import RMSNorm
from moekit.model.rope import rotation
from moekit.model.token_step import token_step
from moekit.moe.layer import MoE
from moekit.moe.routing import Routing
from moekit.tensors import Bool, Float, Int, Tensor


class Output(NamedTuple):
    """Scores of the next token at each place, and one routing for each mixture-of-experts layer."""

    logits: Float[Tensor, "B S V"]
    routings: tuple[Routing, ...]


class Hidden(NamedTuple):
    """The last layer's output after the final norm, and one routing for each mixture-of-experts layer."""

    states: Float[Tensor, "B S D"]
    routings: tuple[Routing, ...]


class Size(NamedTuple):
    """Parameters that are stored, and those that compute one token, embedding and head included in both.

    The prediction module is stored; text is computed without it.
    """

    stored: int
    active: int


class Transformer(nn.Module):
    """A decoder-only language model. `model(ids)` gives logits and routings; a `Cache` makes generation incremental.

    `model_type` is the hub's family that the model was loaded as, and is saved as again where several would do.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.model_type: str | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, n, n in config.dense_layers) for n in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.mtp = MultiTokenPrediction(config) if config.mtp_depth else None
        initialise(self, config.init_std, generator)

    def forward(
        self,
        ids: Int[Tensor, "B S"],
        cache: Cache | None = None,
        mask: Bool[Tensor, "B S"] | None = None,
        tasks: Int[Tensor, " B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Output:
        """Logits of the token after each of `ids`. `mask` is False at padding, which must stand on the left.

        With a cache, `ids` follow what it remembers and are added to it. Task routing needs the task of each sequence.
        In training, chance in the routing comes from `generator` (None: torch's default).
        """
        states, routings = self.hidden(ids, cache, mask, tasks, generator)
        return Output(self.head(states), routings)

    def hidden(
        self,
        ids: Int[Tensor, "B S"],
        cache: Cache | None = None,
        mask: Bool[Tensor, "B S"] | None = None,
        tasks: Int[Tensor, " B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Hidden:
        """As `forward`, without the head."""
        x, blocks = self.embedding(ids), cast(list[Block], [*self.layers])
        if cache is not None and mask is None:
            found = token_step(self.config, blocks, self.norm, x, cache)
            if found is not None:
                return Hidden(*found)
        context = self._context(ids, cache, mask)._replace(tasks=tasks, generator=generator)
        routings = []
        caches = [None] * self.config.n_layers if cache is None else cache.layers
        for layer, own in zip(self.layers, caches, strict=True):
            x, routing = layer(x, context, own)
            if routing is not None:
                routings.append(routing)
        return Hidden(self.norm(x), tuple(routings))

    def hidden_after_next(
        self,
        states: Float[Tensor, "B S D"],
        next_ids: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B S"] | None = None,
        tasks: Int[Tensor, " B"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Hidden:
        """Multi-token prediction: states h_i and tokens i + 1 give states whose head predicts tokens i + 2."""
        if self.mtp is None:
            raise ValueError("this model has no multi-token prediction module")
        context = self._context(next_ids, None, mask)._replace(tasks=tasks, generator=generator)
        x, routing = self.mtp(states, self.embedding(next_ids), context)
        return Hidden(x, () if routing is None else (routing,))

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens, padding included."""
        return Cache(self.config.n_layers, capacity)

    def moe_layers(self) -> list[MoE]:
        """The mixture-of-experts layers in the order of `Output.routings`, then that of the prediction module."""
        blocks = [*self.layers, *([self.mtp.block] if self.mtp is not None else [])]
        return [block.feed_forward for block in blocks if isinstance(block.feed_forward, MoE)]

    def size(self) -> Size:
        """How many parameters the model has, selection biases included."""
        moe, layers = self.config.moe, len(self.config.moe_layers)
        # Shapes alone: the weights of a loaded model may still be on disk.
        with torch.device("meta"):
            shapes = Transformer(self.config)
        stored = sum(p.numel() for p in shapes.parameters())
        idle = layers * (moe.n_routed - moe.active_experts) * 3 * moe.expert_width * self.config.width
        prediction = 0 if shapes.mtp is None else sum(p.numel() for p in shapes.mtp.parameters())
        return Size(stored, stored - prediction - idle)

    def _context(self, ids: Tensor, cache: Cache | None, mask: Tensor | None) -> Context:
        past, n_new = 0 if cache is None else cache.length, ids.shape[1]
        positions = torch.arange(past, past + n_new, device=ids.device)
        visible = visibility(mask, n_new, cache)
        real = mask if cache is None else cache.mask
        if real is not None:
            # Positions count real tokens, so that a padded prompt reads as it would alone.
            positions = (real.long().cumsum(dim=1) - 1).clamp_min(0)[:, past:]
        return Context(
            rotation(self.config.rope, self.config.attention.rotary_width, positions),
            None if visible is None else visible.to(ids.device),
            mask,
            ids,
        )
