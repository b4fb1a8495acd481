"""One block of the transformer: attention, then a dense or a mixture-of-experts feed-forward."""

from typing import NamedTuple

from torch import nn

from moekit.config.model import MLAConfig, ModelConfig
from moekit.kernels.linear import must_be_called
from moekit.kernels.mixture import Mixture
from moekit.kernels.token import Rows
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
        x, normed = self.feed_forward_norm.of_sum(x, self.attention(self.attention_norm(x), context, cache))
        if isinstance(self.feed_forward, MoE):
            y, routing = self.feed_forward(normed, context.mask, context.ids, context.tasks, context.generator)
            return BlockOutput(x + y, routing)
        return BlockOutput(x + self.feed_forward(normed), None)

    def described(self, rows: Rows, cache: LayerCache, before: int) -> tuple[bytes, Mixture | bytes] | None:
        """The two jobs of compiled code that change the residual stream as this block does, for one new token that
        sees all of its past; None where it would not be the same. So many choices come `before` that of this block."""
        feed_forward, (x, y, _) = self.feed_forward, (rows.normed, rows.stream, rows.turn)
        if must_be_called(self) or must_be_called(feed_forward):
            return None
        mixed = feed_forward.described(x, y, before) if isinstance(feed_forward, MoE) else feed_forward.described(x, y)
        first = self.attention.described(rows, self.attention_norm, self.feed_forward_norm, cache)
        return None if first is None or mixed is None else (first, mixed)
