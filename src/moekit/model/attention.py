"""Scaled dot-product attention over what a token may see."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from moekit.kernels import attention as compiled
from moekit.model.cache import Cache
from moekit.model.rope import Rotation
from moekit.tensors import Bool, Float, Int, Tensor

SHORT = 512
"""Sequences up to this length train faster with whole score matrices, on a CPU in bfloat16."""


class Context(NamedTuple):
    """What all layers of one forward pass share: the rotation of the new tokens, what they may see, what they are.

    `visible` is None where each new token sees all up to itself, and they are the whole sequence, or but one. `mask` is
    False at padding, `ids` and `tasks` are what routing may go by, chance in it comes from `generator`.
    """

    rotation: Rotation
    visible: Bool[Tensor, "B_or_1 1 S past_and_S"] | None
    mask: Bool[Tensor, "B S"] | None = None
    ids: Int[Tensor, "B S"] | None = None
    tasks: Int[Tensor, " B"] | None = None
    generator: torch.Generator | None = None


def attend(
    q: Float[Tensor, "B H S C"],
    k: Float[Tensor, "B H T C"],
    v: Float[Tensor, "B H T W"],
    context: Context,
    scale: float,
) -> Float[Tensor, "B H S W"]:
    """softmax(q k^T scale) v over what is visible."""
    # A single new token sees all there is.
    causal = context.visible is None and q.shape[2] == k.shape[2]
    if causal and compiled.runs_here(q, k, v):
        return _CompiledAttention.apply(q, k, v, scale)
    if causal and _prefers_whole_scores(q):
        return _ShortCausalAttention.apply(q, k, v, scale)
    width = v.shape[-1]
    # The fused CPU kernels want keys and values of one width.
    if width < k.shape[-1]:
        v = F.pad(v, (0, k.shape[-1] - width))
    elif width > k.shape[-1]:
        q, k = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.visible, is_causal=causal, scale=scale)
    return out[..., :width]


def _prefers_whole_scores(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= SHORT


class _CompiledAttention(torch.autograd.Function):
    """Causal attention of compiled code, which computes the probabilities again in its backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, normaliser = compiled.attend(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, normaliser)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, out, normaliser = ctx.saved_tensors
        return *compiled.attend_backward(q, k, v, out, normaliser, grads[0], ctx.scale), None


class _ShortCausalAttention(torch.autograd.Function):
    """Causal attention that keeps its probabilities, [B H S S]: a third of the fused kernel's time, more memory."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.heads, ctx.scale = q.shape[:2], scale
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        future = q.new_full((q.shape[1], k.shape[1]), -torch.inf).triu_(1)
        probability = torch.baddbmm(future, q, k.mT, alpha=scale).softmax(dim=-1)
        ctx.save_for_backward(q, k, v, probability)
        return torch.bmm(probability, v).unflatten(0, ctx.heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, probability = ctx.saved_tensors
        grad = grads[0].flatten(0, 1)
        grad_v = torch.bmm(probability.mT, grad)
        grad_probability = torch.bmm(grad, v.mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probability, probability, -1, q.dtype).mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q)
        grad_q, grad_k, grad_v = (x.unflatten(0, ctx.heads) for x in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def visibility(mask: Bool[Tensor, "B S"] | None, n_new: int, cache: Cache | None) -> Tensor | None:
    """Who sees whom, [B or 1, 1, S, past + S]: each new token all real ones up to itself. None: plainly causal.

    A padding token sees itself, since a softmax over nothing would be nan.
    """
    past = 0 if cache is None else cache.length
    real = mask if cache is None else cache.extend_mask(mask, n_new)
    if real is None and (past == 0 or n_new == 1):
        return None
    device = None if real is None else real.device
    query = torch.arange(past, past + n_new, device=device).unsqueeze(-1)
    key = torch.arange(past + n_new, device=device)
    visible = (key <= query).view(1, 1, n_new, -1)
    return visible if real is None else visible & real[:, None, None, :] | (key == query)
