"""Multi-token prediction of depth 1 (arXiv 2412.19437, section 2.2): from h_i and token i + 1, predict token i + 2."""

import torch
from torch import nn

from moekit.config.model import ModelConfig
from moekit.kernels.linear import Linear
from moekit.model.attention import Context
from moekit.model.block import Block, BlockOutput
from moekit.model.norm import RMSNorm
from moekit.tensors import Float, Tensor


class MultiTokenPrediction(nn.Module):
    """A projection of both inputs, a block of its own, and a norm; embedding and head are the main model's.

    The paper writes [h; embedding]; released checkpoints hold the weights for [embedding; h], with h after the final
    norm, and so does this module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.width, config.norm_epsilon)
        self.hidden_norm = RMSNorm(config.width, config.norm_epsilon)
        self.projection = Linear(2 * config.width, config.width, bias=False)
        self.block = Block(config, config.n_layers, dense=not config.moe_layers)
        self.norm = RMSNorm(config.width, config.norm_epsilon)

    def forward(
        self,
        hidden: Float[Tensor, "B S D"],
        embedding: Float[Tensor, "B S D"],
        context: Context,
    ) -> BlockOutput:
        """`hidden[i]` is h_i, `embedding[i]` that of token i + 1; the result, normed, predicts token i + 2."""
        joined = torch.cat([self.embedding_norm(embedding), self.hidden_norm(hidden)], dim=-1)
        x, routing = self.block(self.projection(joined), context)
        return BlockOutput(self.norm(x), routing)
