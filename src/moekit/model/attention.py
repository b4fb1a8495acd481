"""Scaled dot-product attention over what a token may see."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from moekit.model.cache import Cache
from moekit.model.rope import Rotation
from moekit.tensors import Bool, Float, Tensor


class Context(NamedTuple):
    """What all layers of one forward pass share: the rotation of the new tokens, and what they may see.

    `visible` is None where the new tokens are the whole sequence and see all before them.
    """

    rotation: Rotation
    visible: Bool[Tensor, "B_or_1 1 S past_and_S"] | None


def attend(
    q: Float[Tensor, "B H S C"], k: Float[Tensor, "B H T C"], v: Float[Tensor, "B H T W"], context: Context, scale: float
) -> Float[Tensor, "B H S W"]:
    """softmax(q k^T scale) v. Values narrower or wider than keys are padded: the fused CPU kernels want equal widths."""
    width = v.shape[-1]
    if width < k.shape[-1]:
        v = F.pad(v, (0, k.shape[-1] - width))
    elif width > k.shape[-1]:
        q, k = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k))
    causal = context.visible is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.visible, is_causal=causal, scale=scale)
    return out[..., :width]


def visibility(mask: Bool[Tensor, "B S"] | None, n_new: int, cache: Cache | None) -> Tensor | None:
    """Who sees whom, [B or 1, 1, S, past + S]: each new token all real ones up to itself. None: plainly causal.

    A padding token sees itself, since a softmax over nothing would be nan.
    """
    past = 0 if cache is None else cache.length
    real = mask
    if cache is not None:
        real = cache.extend_mask(mask, n_new)
    if real is None and past == 0:
        return None
    device = real.device if real is not None else None
    query = torch.arange(past, past + n_new, device=device).unsqueeze(-1)
    key = torch.arange(past + n_new, device=device)
    visible = (key <= query).view(1, 1, n_new, -1)
    return visible if real is None else visible & real[:, None, None, :] | (key == query)
