"""The largest model of the same kind that is small enough to be tried here."""

from dataclasses import replace

from moekit.config.errors import ConfigError
from moekit.config.model import MLAConfig, ModelConfig
from moekit.plan.from_config import blueprint_of


def shrunk(config: ModelConfig, most: int) -> ModelConfig:
    """`config` with at most `most` parameters: fewer layers, then fewer experts, then all widths and the vocabulary
    halved. It keeps a dense layer and a mixture where it has both, the heads, and how many experts a token takes."""
    config = replace(config, mtp_depth=0)
    least = _layers(config, 1 + bool(config.dense_layers and config.moe_layers))
    while parameters(least) > most:
        fewer = _fewer_experts(least) or _narrower(least)
        if fewer == least:
            break
        least = fewer
    each = parameters(_layers(_like(config, least), least.n_layers + 1)) - parameters(least)
    more = max((most - parameters(least)) // max(each, 1), 0)
    return _layers(_like(config, least), min(config.n_layers, least.n_layers + more))


def parameters(config: ModelConfig) -> int:
    """Parameters that are stored."""
    return sum(weight.stored for weight in blueprint_of(config, "", "").weights)


def _like(config: ModelConfig, small: ModelConfig) -> ModelConfig:
    """`small` with the layers of `config`."""
    return replace(small, n_layers=config.n_layers, dense_layers=config.dense_layers)


def _layers(config: ModelConfig, n_layers: int) -> ModelConfig:
    """The first layers; where a model begins with many dense ones, one of them and mixtures."""
    n_layers = min(n_layers, config.n_layers)
    dense = tuple(layer for layer in config.dense_layers if layer < n_layers)
    if config.moe_layers and len(dense) == n_layers and n_layers > 1:
        dense = dense[:1]
    return replace(config, n_layers=n_layers, dense_layers=dense)


def _fewer_experts(config: ModelConfig) -> ModelConfig | None:
    moe = config.moe
    if not config.moe_layers or moe.n_routed % 2 or moe.n_routed < 4 * moe.top_k:
        return None
    try:
        return replace(config, moe=replace(moe, n_routed=moe.n_routed // 2))
    except ConfigError:
        return None


def _narrower(config: ModelConfig) -> ModelConfig:
    half = {name: max(getattr(config, name) // 2, 32) for name in ("width", "dense_width", "vocab_size")}
    moe = replace(config.moe, width=0, expert_width=max(config.moe.expert_width // 2, 16))
    attention = config.attention
    if isinstance(attention, MLAConfig) and attention.q_lora_rank:
        attention = replace(attention, q_lora_rank=max(attention.q_lora_rank // 2, 16))
    return replace(config, **half, moe=moe, attention=attention)
