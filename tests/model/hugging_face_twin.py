"""A transformers model with random weights, and a moekit model with the same ones, copied name by name."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.config.model import ModelConfig
from moekit.model.transformer import Transformer

BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.router.centroids": "mlp.gate.weight",
    "feed_forward.balance.bias.selection_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.experts.gate_up": "mlp.experts.gate_up_proj",
    "feed_forward.experts.down": "mlp.experts.down_proj",
    "feed_forward.down.weight": "mlp.down_proj.weight",
    "feed_forward.shared_gate.weight": "mlp.shared_expert_gate.weight",
}
ATTENTION = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "o_proj",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "q_a": "q_a_proj",
    "q_a_norm": "q_a_layernorm",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "kv_a_norm": "kv_a_layernorm",
    "kv_b": "kv_b_proj",
}
TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Norms around 1, everything else around 0, selection biases included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)


def copied(config: ModelConfig, source: PreTrainedModel) -> Transformer:
    """A moekit model with the weights of `source`; none may be missing or left over."""
    theirs = source.state_dict()
    model = Transformer(config).eval()
    model.load_state_dict({name: taken(theirs, name) for name in model.state_dict()})
    assert not theirs, f"left over: {sorted(theirs)}"
    return model


def taken(theirs: dict[str, Tensor], name: str) -> Tensor:
    if name in TOP:
        return theirs.pop(TOP[name])
    _, layer, rest = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if rest in BLOCK:
        return theirs.pop(prefix + BLOCK[rest])
    part, *inner, kind = rest.split(".")
    if part == "attention":
        return theirs.pop(f"{prefix}self_attn.{ATTENTION[inner[0]]}.{kind}")
    place = prefix + "mlp."
    if inner[0] == "shared":
        plural = (
            f"{place}shared_experts.down_proj.weight" in theirs or f"{place}shared_experts.gate_proj.weight" in theirs
        )
        place += "shared_experts." if plural else "shared_expert."
    if inner[-1] == "down":
        return theirs.pop(f"{place}down_proj.weight")
    return torch.cat([theirs.pop(f"{place}{half}_proj.weight") for half in ("gate", "up")])
