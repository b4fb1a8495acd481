"""Grouped-query attention (arXiv 2305.13245), and multi-head attention as its special case."""

import torch
from torch import nn

from moekit.config.model import GQAConfig, ModelConfig
from moekit.kernels import one_query
from moekit.kernels.linear import Linear
from moekit.kernels.one_query import Past
from moekit.kernels.products import products, run_here
from moekit.model.attention import Context, attend
from moekit.model.cache import LayerCache
from moekit.model.norm import RMSNorm
from moekit.model.rope import rotate, turn
from moekit.tensors import Float, Tensor


class GroupedQueryAttention(nn.Module):
    """Heads in groups that share one key and value head; optional RMSNorm and clipping."""

    def __init__(self, config: ModelConfig, attention: GQAConfig) -> None:
        super().__init__()
        self.shape = attention
        a, width = attention, config.width
        self.scale = a.head_dim**-0.5
        self.q = Linear(width, a.n_heads * a.head_dim, bias=a.qkv_bias)
        self.k = Linear(width, a.n_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.v = Linear(width, a.n_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.out = Linear(a.n_heads * a.head_dim, width, bias=a.out_bias)
        if a.qk_norm != "none":
            full = a.qk_norm == "full"
            self.q_norm = RMSNorm(a.head_dim * (a.n_heads if full else 1), config.norm_epsilon)
            self.k_norm = RMSNorm(a.head_dim * (a.n_kv_heads if full else 1), config.norm_epsilon)

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, cache: LayerCache | None = None
    ) -> Float[Tensor, "B S D"]:
        if cache is not None and self._decodes(x, context):
            return self._one_token(x, context, cache)
        q, k, v = self._normed(self.q(x), self.k(x), self.v(x))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
        groups = self.shape.n_heads // self.shape.n_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.out(attend(q, k, v, context, self.scale).transpose(1, 2).flatten(2))

    def _normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in heads, [B S H C], normed and clipped."""
        a = self.shape
        if a.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(*y.shape[:-1], -1, a.head_dim) for y in (q, k, v))
        if a.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if a.clip_qkv is not None:
            q, k, v = (y.clamp(-a.clip_qkv, a.clip_qkv) for y in (q, k, v))
        return q, k, v

    def _decodes(self, x: Tensor, context: Context) -> bool:
        """Whether the new token is one, sees all of the past, and compiled code attends."""
        return x.shape[1] == 1 and context.visible is None and one_query.runs_here(x)

    def _one_token(self, x: Float[Tensor, "B 1 D"], context: Context, cache: LayerCache) -> Float[Tensor, "B 1 D"]:
        """Three products, one call over the past, and the output's product."""
        a, batch, three = self.shape, len(x), (self.q, self.k, self.v)
        fast = run_here(x, (*three, self.out), x.dtype)
        plain = a.qk_norm == "none"
        q, k, v = products(x, three, torch.float32 if plain else x.dtype) if fast else [each(x) for each in three]
        if not plain or a.clip_qkv is not None:
            q, k, v = self._normed(q, k, v)
        q, k, v = (y.view(batch, -1, a.head_dim) for y in (q, k, v))
        shape = (batch, a.n_kv_heads, a.head_dim)
        length, (keys, values) = cache.reserve(1, x, k=shape, v=shape)
        past = Past(keys, values, length)
        heads = one_query.attend(q, k, v, turn(context.rotation), past, self.scale, a.head_dim).view(batch, 1, -1)
        return products(heads, (self.out,), x.dtype)[0] if fast else self.out(heads)
