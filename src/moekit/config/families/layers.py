"""Which layers are dense, in `config.json`."""

from typing import Any

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.config.model import ModelConfig


def read_first_dense(fields: HubFields, n_layers: int) -> tuple[int, ...]:
    """DeepSeek: a layer has experts from `first_k_dense_replace` on, if `moe_layer_freq` divides its number."""
    first, every = fields.get("first_k_dense_replace", int, 0), fields.positive("moe_layer_freq", 1)
    return tuple(layer for layer in range(n_layers) if layer < first or layer % every)


def write_first_dense(config: ModelConfig) -> dict[str, Any]:
    """The fields `read_first_dense` reads; it reads another model where the pattern is none of DeepSeek's."""
    mixed = config.moe_layers
    first = mixed[0] if mixed else config.n_layers
    if first + len(mixed) == config.n_layers:
        every = 1
    else:
        every = mixed[1] - first if len(mixed) > 1 else first or config.n_layers
    return {"first_k_dense_replace": first, "moe_layer_freq": every}


def read_listed_dense(fields: HubFields, n_layers: int) -> tuple[int, ...]:
    """Qwen: every `decoder_sparse_step`-th layer has experts, but for those of `mlp_only_layers`."""
    step, listed = fields.positive("decoder_sparse_step", 1), fields.get("mlp_only_layers", list, [])
    whole = all(type(layer) is int for layer in listed)
    check(whole, "mlp_only_layers", f"{listed!r} is not a list of layers")
    dense = set(listed)
    return tuple(layer for layer in range(n_layers) if layer in dense or (layer + 1) % step)


def write_listed_dense(config: ModelConfig) -> dict[str, Any]:
    """The fields `read_listed_dense` reads."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
