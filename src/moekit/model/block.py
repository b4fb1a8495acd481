"""One block of the transformer: attention, then a dense or a mixture-of-experts feed-forward."""

from typing import NamedTuple

from torch import nn

from moekit.config.model import MLAConfig, ModelConfig
from moekit.model.attention import Context
from moekit.model.cache import LayerCache
from moekit.model.gqa import GroupedQueryAttention
from moekit.model.mla import LatentAttention
from moekit.model.norm import RMSNorm
from moekit.moe.layer import MoE
from moekit.moe.routing import Routing
from moekit.moe.swiglu import SwiGLU
from moekit.tensors import Float, Tensor


class BlockOutput(NamedTuple):
    """The residual stream after the block, and the routing where it has experts."""

    x: Float[Tensor, "B S D"]
    routing: Routing | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, dense: bool) -> None:
        super().__init__()
        attention = config.attention
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        if isinstance(attention, MLAConfig):
            self.attention = LatentAttention(config, attention)
        else:
            self.attention = GroupedQueryAttention(config, attention)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward = SwiGLU(config.width, config.dense_width) if dense else MoE(config.moe_block_at(layer))

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        context: Context,
        cache: LayerCache | None = None,
    ) -> BlockOutput:
        x, normed = self._attended(x, context, cache)
        if isinstance(self.feed_forward, MoE):
            y, routing = self.feed_forward(normed, context.mask, context.ids, context.tasks, context.generator)
            return BlockOutput(x + y, routing)
        return BlockOutput(x + self.feed_forward(normed), None)

    def _attended(self, x: Tensor, context: Context, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm."""
        before, after = self.attention_norm, self.feed_forward_norm
        found = None if cache is None else self.attention.step(x, before, after, context, cache)
        return found or after.of_sum(x, self.attention(before(x), context, cache))
