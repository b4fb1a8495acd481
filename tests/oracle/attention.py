"""Causal attention, one head and one query at a time."""

import torch
from torch import Tensor

from oracle.rotary import rotated


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean() + epsilon).sqrt() * weight


def attended(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """softmax(q . k_j * scale) v_j over the keys this query may see."""
    scores = torch.stack([q @ key * scale for key in keys])
    weights = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def grouped_query_attention(
    x: Tensor, module: torch.nn.Module, turns: list[float], layout: str, epsilon: float
) -> Tensor:
    """One sequence [S D] through the weights of a GroupedQueryAttention (arXiv 2305.13245)."""
    a = module.shape
    queries, keys, values = [], [], []
    for position, h in enumerate(x):
        q, k, v = module.q(h), module.k(h), module.v(h)
        if a.qk_norm == "full":
            q, k = rms_norm(q, module.q_norm.weight, epsilon), rms_norm(k, module.k_norm.weight, epsilon)
        q, k, v = (list(y.split(a.head_dim)) for y in (q, k, v))
        if a.qk_norm == "head":
            q = [rms_norm(head, module.q_norm.weight, epsilon) for head in q]
            k = [rms_norm(head, module.k_norm.weight, epsilon) for head in k]
        if a.clip_qkv is not None:
            q, k, v = ([head.clamp(-a.clip_qkv, a.clip_qkv) for head in heads] for heads in (q, k, v))
        queries.append([rotated(head, position, turns, layout) for head in q])
        keys.append([rotated(head, position, turns, layout) for head in k])
        values.append(v)
    rows = []
    for t in range(len(x)):
        heads = []
        for head in range(a.n_heads):
            shared = head // (a.n_heads // a.n_kv_heads)
            past_keys = [key[shared] for key in keys[: t + 1]]
            past_values = [value[shared] for value in values[: t + 1]]
            heads.append(attended(queries[t][head], past_keys, past_values, a.head_dim**-0.5))
        rows.append(module.out(torch.cat(heads)))
    return torch.stack(rows)


def latent_attention(x: Tensor, module: torch.nn.Module, turns: list[float], layout: str, factor: float) -> Tensor:
    """One sequence [S D] through the weights of a LatentAttention (arXiv 2405.04434, eqs 9-19).

    `factor` multiplies the softmax scale (YaRN).
    """
    a = module.shape
    nope, rope, rank = a.qk_nope_head_dim, a.qk_rope_head_dim, a.kv_lora_rank
    queries, keys, values = [], [], []
    for position, h in enumerate(x):
        q = module.q(h) if a.q_lora_rank is None else module.q_b(rms_norm(module.q_a(h), module.q_a_norm.weight, 1e-6))
        compressed = module.kv_a(h)
        latent = rms_norm(compressed[:rank], module.kv_a_norm.weight, 1e-6)
        k_rope = rotated(compressed[rank:], position, turns, layout)
        q_heads = q.split(nope + rope)
        kv_heads = module.kv_b(latent).split(nope + a.v_head_dim)
        queries.append([torch.cat([q[:nope], rotated(q[nope:], position, turns, layout)]) for q in q_heads])
        keys.append([torch.cat([kv[:nope], k_rope]) for kv in kv_heads])
        values.append([kv[nope:] for kv in kv_heads])
    scale = (nope + rope) ** -0.5 * factor
    rows = []
    for t in range(len(x)):
        heads = [
            attended(queries[t][i], [key[i] for key in keys[: t + 1]], [value[i] for value in values[: t + 1]], scale)
            for i in range(a.n_heads)
        ]
        rows.append(module.out(torch.cat(heads)))
    return torch.stack(rows)
