"""Grouped-query attention (arXiv 2305.13245), and multi-head attention as its special case."""

from torch import nn

from moekit.config.model import GQAConfig, ModelConfig
from moekit.kernels import one_query
from moekit.kernels.attention_step import Norms, attention_step
from moekit.kernels.linear import Linear, must_be_called
from moekit.kernels.one_query import Past
from moekit.kernels.token import Rows
from moekit.model.attention import Context, attend
from moekit.model.cache import LayerCache
from moekit.model.norm import RMSNorm, norms_alike
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

    def described(self, rows: Rows, before: RMSNorm, after: RMSNorm, cache: LayerCache) -> bytes | None:
        """The job of compiled code that adds self(before(x)) to the residual stream and norms that by `after`, for one
        new token that sees all of its past; None where it would not be the same."""
        a, dtype = self.shape, rows.stream.dtype
        norms = (before, after) if a.qk_norm == "none" else (before, after, self.q_norm, self.k_norm)
        layers = [each for layer in (self.q, self.k, self.v, self.out) if (each := layer.described(dtype))]
        if len(layers) < 4 or must_be_called(self) or not norms_alike(norms, dtype):
            return None
        weights = Norms(tuple(each.weight for each in norms), a.qk_norm == "full", before.epsilon)
        return attention_step(rows, weights, layers, self._past(rows.stream, cache), self.scale, a.clip_qkv)

    def _one_token(self, x: Float[Tensor, "B 1 D"], context: Context, cache: LayerCache) -> Float[Tensor, "B 1 D"]:
        """Three products, one call over the past, and the output's product."""
        a, batch = self.shape, len(x)
        q, k, v = self._normed(self.q(x), self.k(x), self.v(x))
        q, k, v = (y.reshape(batch, -1, a.head_dim) for y in (q, k, v))
        past = self._past(x, cache)
        cache.count(1)
        heads = one_query.attend(q, k, v, turn(context.rotation), past, self.scale, a.head_dim)
        return self.out(heads.view(batch, 1, -1))

    def _past(self, x: Tensor, cache: LayerCache) -> Past:
        """The room for keys and values of tokens like `x`."""
        shape = (len(x), self.shape.n_kv_heads, self.shape.head_dim)
        keys, values = cache.room(x, k=shape, v=shape)
        return Past(keys, values, cache.length)
