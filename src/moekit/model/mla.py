"""Multi-head latent attention (arXiv 2405.04434, section 2.1): keys and values come from one small latent."""

import torch
from torch import nn

from moekit.config.model import MLAConfig, ModelConfig
from moekit.kernels import one_query
from moekit.kernels.attention_step import Latent, Norms, latent_attention_step
from moekit.kernels.linear import Linear, must_be_called
from moekit.kernels.one_query import Past
from moekit.kernels.token import Rows
from moekit.model.attention import Context, attend
from moekit.model.cache import LayerCache
from moekit.model.norm import RMSNorm, norms_alike
from moekit.model.rope import rotate, softmax_factor, turn
from moekit.tensors import Float, Tensor

LATENT_EPSILON = 1e-6
"""The norms of the latents keep this epsilon whatever the model's (released modelling code of V2 and V3)."""


class LatentAttention(nn.Module):
    """MLA. While decoding, only the latent and the rotary key are cached, and the projections are absorbed."""

    def __init__(self, config: ModelConfig, attention: MLAConfig) -> None:
        super().__init__()
        self.shape = attention
        a, width = attention, config.width
        qk_head_dim = a.qk_nope_head_dim + a.qk_rope_head_dim
        self.scale = qk_head_dim**-0.5 * softmax_factor(config.rope)
        if a.q_lora_rank is None:
            self.q = Linear(width, a.n_heads * qk_head_dim, bias=False)
        else:
            self.q_a = Linear(width, a.q_lora_rank, bias=a.bias)
            self.q_a_norm = RMSNorm(a.q_lora_rank, LATENT_EPSILON)
            self.q_b = Linear(a.q_lora_rank, a.n_heads * qk_head_dim, bias=False)
        self.kv_a = Linear(width, a.kv_lora_rank + a.qk_rope_head_dim, bias=a.bias)
        self.kv_a_norm = RMSNorm(a.kv_lora_rank, LATENT_EPSILON)
        self.kv_b = Linear(a.kv_lora_rank, a.n_heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.out = Linear(a.n_heads * a.v_head_dim, width, bias=a.bias)

    def forward(
        self, x: Float[Tensor, "B S D"], context: Context, cache: LayerCache | None = None
    ) -> Float[Tensor, "B S D"]:
        a = self.shape
        if cache is not None and x.shape[1] == 1 and context.visible is None and one_query.runs_here(x):
            return self._one_token(x, context, cache)
        q = self.q(x) if a.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x)))
        q_nope, q_rope = (
            q.unflatten(-1, (a.n_heads, -1)).transpose(1, 2).split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        )
        q_rope = rotate(q_rope, context.rotation)
        latent, k_rope = self.kv_a(x).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_norm(latent)
        k_rope = rotate(k_rope.unsqueeze(1), context.rotation).squeeze(1)
        if cache is not None:
            (past,) = cache.append(latent=torch.cat([latent, k_rope], dim=-1))
            if x.shape[1] == 1:
                return self.out(self._absorbed(q_nope, q_rope, past, context).transpose(1, 2).flatten(2))
            latent, k_rope = past.split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        heads = self._expanded(q_nope, q_rope, latent, k_rope, context)
        return self.out(heads.transpose(1, 2).flatten(2))

    def described(self, rows: Rows, before: RMSNorm, after: RMSNorm, cache: LayerCache) -> bytes | None:
        """The job of compiled code that adds self(before(x)) to the residual stream and norms that by `after`, for one
        new token that sees all of its past; None where it would not be the same."""
        a, x, plain = self.shape, rows.stream, self.shape.q_lora_rank is None
        first, norms = (self.q,) if plain else (self.q_a, self.q_b), (before, after)
        layers = [each.described(x.dtype) for each in (*first, self.kv_a, self.out)]
        own = (self.kv_a_norm,) if plain else (self.kv_a_norm, self.q_a_norm)
        kv_b = self.kv_b.weight
        readable = norms_alike(norms, x.dtype) and norms_alike(own, x.dtype)
        plain_matrix = kv_b.dtype == x.dtype and kv_b.is_contiguous() and not must_be_called(self.kv_b)
        if None in layers or must_be_called(self) or not readable or not plain_matrix:
            return None
        if plain:
            layers.insert(1, None)
        sizes = (a.n_heads, a.qk_nope_head_dim, a.v_head_dim, a.kv_lora_rank)
        latent = Latent(*sizes, None if plain else self.q_a_norm.weight, own[0].weight, kv_b, LATENT_EPSILON)
        weights = Norms((before.weight, after.weight), False, before.epsilon)
        return latent_attention_step(rows, weights, layers, latent, self._past(x, cache), self.scale)

    def _one_token(self, x: Float[Tensor, "B 1 D"], context: Context, cache: LayerCache) -> Float[Tensor, "B 1 D"]:
        """As `_absorbed`, by compiled code, which turns, appends and attends in one call."""
        a, batch = self.shape, len(x)
        q = self.q(x) if a.q_lora_rank is None else self.q_b(self.q_a_norm(self.q_a(x)))
        q_nope, q_rope = q.view(batch, a.n_heads, -1).split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_a(x).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        key = torch.cat([self.kv_a_norm(latent), k_rope], dim=-1)
        w_uk, w_uv = self._up_projections()
        q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        past = self._past(x, cache)
        cache.count(1)
        query = torch.cat([q_latent, q_rope], dim=-1)
        summed = one_query.attend(query, key, None, turn(context.rotation), past, self.scale, a.kv_lora_rank)
        heads = torch.bmm(summed.transpose(0, 1), w_uv.mT).transpose(0, 1).reshape(batch, 1, -1)
        return self.out(heads)

    def _past(self, x: Tensor, cache: LayerCache) -> Past:
        """The room for latents and rotary keys of tokens like `x`."""
        (room,) = cache.room(x, latent=(len(x), self.shape.kv_lora_rank + self.shape.qk_rope_head_dim))
        return Past(room.unsqueeze(1), None, cache.length)

    def _up_projections(self) -> tuple[Float[Tensor, "H nope latent"], Float[Tensor, "H W latent"]]:
        """From the latent to keys without position, and to values."""
        a = self.shape
        weight = self.kv_b.weight.view(a.n_heads, -1, a.kv_lora_rank)
        w_uk, w_uv = weight.split([a.qk_nope_head_dim, a.v_head_dim], dim=1)
        return w_uk, w_uv

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, context: Context) -> Tensor:
        """Keys and values in full, [B H T C]: fastest for many new tokens (eqs 10-18)."""
        a = self.shape
        kv = self.kv_b(latent).unflatten(-1, (a.n_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([a.qk_nope_head_dim, a.v_head_dim], dim=-1)
        k = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, a.n_heads, -1, -1)], dim=-1)
        # As a view, values would keep the whole product until the backward pass.
        v = v.contiguous() if torch.is_grad_enabled() else v
        return attend(torch.cat([q_nope, q_rope], dim=-1), k, v, context, self.scale)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, past: Tensor, context: Context) -> Tensor:
        """One new token: W_UK moves into the query and W_UV behind the sum, so that the past stays latent."""
        a = self.shape
        w_uk, w_uv = self._up_projections()
        q_latent = torch.bmm(q_nope.squeeze(2).transpose(0, 1), w_uk).transpose(0, 1)
        # All heads look at the same past: as rows of one product, for as a batch of products each would copy it.
        scores = torch.cat([q_latent, q_rope.squeeze(2)], dim=-1) @ past.mT
        scores = scores.float() * self.scale
        if context.visible is not None:
            scores = scores.masked_fill(~context.visible.squeeze(2), -torch.inf)
        summed = scores.softmax(dim=-1).to(past.dtype) @ past[..., : a.kv_lora_rank]
        return torch.bmm(w_uv, summed.permute(1, 2, 0)).permute(2, 0, 1).unsqueeze(2)
