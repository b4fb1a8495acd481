"""Grouped-query attention (arXiv 2305.13245), and multi-head attention as its special case."""

from torch import nn

from moekit.config.model import GQAConfig, ModelConfig
from moekit.kernels.linear import Linear
from moekit.model.attention import Context, attend
from moekit.model.cache import LayerCache
from moekit.model.norm import RMSNorm
from moekit.model.rope import rotate
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
        a = self.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if a.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, a.head_dim)) for y in (q, k, v))
        if a.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if a.clip_qkv is not None:
            q, k, v = (y.clamp(-a.clip_qkv, a.clip_qkv) for y in (q, k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        if cache is not None:
            k, v = cache.append(k=k, v=v)
        groups = a.n_heads // a.n_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return self.out(attend(q, k, v, context, self.scale).transpose(1, 2).flatten(2))
