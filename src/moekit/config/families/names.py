"""The hub's names of the tensors that families share, and how a family puts them together."""

from collections.abc import Callable, Mapping

from moekit.config.families.family import Names
from moekit.config.model import ModelConfig

MODEL: Names = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

NORMS: Names = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}

GQA: Names = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.q.bias": "self_attn.q_proj.bias",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.k.bias": "self_attn.k_proj.bias",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.v.bias": "self_attn.v_proj.bias",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.out.bias": "self_attn.o_proj.bias",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}

MLA: Names = {
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.q_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_a.bias": "self_attn.q_a_proj.bias",
    "attention.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.q_b.weight": "self_attn.q_b_proj.weight",
    "attention.kv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a.bias": "self_attn.kv_a_proj_with_mqa.bias",
    "attention.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.out.bias": "self_attn.o_proj.bias",
}

DENSE: Names = {
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.down.weight": "mlp.down_proj.weight",
}

EXPERTS: Names = {
    "feed_forward.router.centroids": "mlp.gate.weight",
    "feed_forward.experts.gate_up": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "feed_forward.experts.down": "mlp.experts.{expert}.down_proj.weight",
}

SHARED_EXPERTS: Names = {
    "feed_forward.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "feed_forward.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}
"""DeepSeek's."""


def names_of(*blocks: Names) -> Callable[[ModelConfig], dict[str, str | tuple[str, ...]]]:
    """A family's `names`, from the tensors of one of its blocks."""
    block = {ours: hub for names in blocks for ours, hub in names.items()}

    def names(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
        named = dict(MODEL)
        for layer in range(config.n_layers):
            named |= in_layer(layer, block, f"layers.{layer}.")
        return named

    return names


def in_layer(layer: int, block: Names, prefix: str) -> dict[str, str | tuple[str, ...]]:
    """The names of a block which is layer `layer` in the file, and stands under `prefix` with us."""
    place = f"model.layers.{layer}."
    return {
        prefix + ours: place + hub if isinstance(hub, str) else tuple(place + name for name in hub)
        for ours, hub in block.items()
    }


def in_layers(layers: tuple[int, ...], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of `tensors` in each of the layers."""
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in tensors.items()}


def hollow(config: ModelConfig, place: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a feed-forward of no width, which transformers builds where there is no shared expert."""
    shapes: dict[str, tuple[int, ...]] = {f"{place}.{part}_proj.weight": (0, config.width) for part in ("gate", "up")}
    return shapes | {f"{place}.down_proj.weight": (config.width, 0)}
