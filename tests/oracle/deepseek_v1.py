"""DeepSeekMoE (arXiv 2401.06066) from its tensors by their names on the hub: one sequence, one token at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oracle.attention import attended, rms_norm
from oracle.gates import best, deepseek_moe_gates, softmax
from oracle.mixture import swiglu
from oracle.rotary import frequencies, rotated


def logits(ids: list[int], weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """[S V] of one sequence."""
    epsilon = config["rms_norm_eps"]
    states = [weights["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        own = {name.removeprefix(at): tensor for name, tensor in weights.items() if name.startswith(at)}
        normed = [rms_norm(h, own["input_layernorm.weight"], epsilon) for h in states]
        states = [h + y for h, y in zip(states, attention(normed, own, config), strict=True)]
        normed = [rms_norm(h, own["post_attention_layernorm.weight"], epsilon) for h in states]
        states = [h + feed_forward(u, own, config) for h, u in zip(states, normed, strict=True)]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return torch.stack([head @ rms_norm(h, weights["model.norm.weight"], epsilon) for h in states])


def projected(x: Tensor, own: Mapping[str, Tensor], name: str) -> Tensor:
    return own[f"self_attn.{name}.weight"] @ x + own.get(f"self_attn.{name}.bias", torch.zeros(()))


def attention(rows: list[Tensor], own: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Tensor]:
    """Heads that share keys and values in groups, turned in halves."""
    n_heads, n_kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // n_heads
    turns = frequencies(config["rope_theta"], width)

    def turned(x: Tensor, position: int) -> list[Tensor]:
        return [rotated(head, position, turns, "half") for head in x.split(width)]

    queries = [turned(projected(x, own, "q_proj"), position) for position, x in enumerate(rows)]
    keys = [turned(projected(x, own, "k_proj"), position) for position, x in enumerate(rows)]
    values = [projected(x, own, "v_proj").split(width) for x in rows]
    out = []
    for t in range(len(rows)):
        heads = []
        for head in range(n_heads):
            shared = head // (n_heads // n_kv)
            seen = [key[shared] for key in keys[: t + 1]], [value[shared] for value in values[: t + 1]]
            heads.append(attended(queries[t][head], *seen, width**-0.5))
        out.append(projected(torch.cat(heads), own, "o_proj"))
    return out


def block(u: Tensor, own: Mapping[str, Tensor], place: str) -> Tensor:
    """A feed-forward of three matrices."""
    gate, up, down = (own[f"{place}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return swiglu(u, torch.cat([gate, up]), down)


def feed_forward(u: Tensor, own: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Eqs 9-11: the shared experts and the chosen ones; without a router, one dense block."""
    if "mlp.gate.weight" not in own:
        return block(u, own, "mlp")
    affinities = list(own["mlp.gate.weight"] @ u)
    top_k = config["num_experts_per_tok"]
    gates = deepseek_moe_gates(affinities, top_k)
    if config["norm_topk_prob"]:
        chosen = best(softmax(affinities), top_k)
        total = sum(gates[i] for i in chosen)
        gates = [gate / total for gate in gates]
    y = sum(gate * block(u, own, f"mlp.experts.{i}") for i, gate in enumerate(gates) if gate != 0)
    return y + block(u, own, "mlp.shared_experts") if "mlp.shared_experts.up_proj.weight" in own else y
