"""What every family says in the same words: sizes, norms, positions, embedding and head."""

from typing import Any, Literal

from moekit.config.errors import check
from moekit.config.families.hub import HubFields
from moekit.config.families.rope import read_rope, write_rope
from moekit.config.model import ModelConfig

MOST_LAYERS = 10_000
"""A damaged number of layers must not keep us busy for hours."""


def read_trunk(
    fields: HubFields,
    layout: Literal["half", "interleaved"] = "half",
    latent: bool = False,
    theta: float = 10000.0,
) -> ModelConfig:
    """A model without dense layers whose attention and experts are still to be put in their places."""
    fields.expect("hidden_act", "silu")
    fields.expect("attention_dropout", 0.0)
    max_positions = fields.positive("max_position_embeddings")
    n_layers = fields.get("num_hidden_layers", int)
    check_layers(n_layers, "num_hidden_layers")
    return ModelConfig(
        vocab_size=fields.get("vocab_size", int),
        width=fields.get("hidden_size", int),
        n_layers=n_layers,
        dense_layers=(),
        dense_width=fields.get("intermediate_size", int),
        rope=read_rope(fields, layout, max_positions, latent, theta),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        norm_epsilon=fields.get("rms_norm_eps", float),
        max_positions=max_positions,
        init_std=fields.get("initializer_range", float, 0.02),
    )


def check_layers(n_layers: int, key: str) -> None:
    """Raise a ConfigError for more layers than any model has."""
    check(n_layers <= MOST_LAYERS, key, f"wants {n_layers} layers, at most {MOST_LAYERS} are supported")


def write_trunk(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields `read_trunk` reads, and what the model is called."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.dense_width,
        "num_hidden_layers": config.n_layers,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        **write_rope(config.rope),
    }
