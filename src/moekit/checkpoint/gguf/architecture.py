"""Which of llama.cpp's architectures computes what a model computes; an error where none does.

Read from llama.cpp's model code (src/models/<name>.cpp and build_moe_ffn in src/llama-graph.cpp): many of its choices,
such as whether expert weights are divided by their sum, belong to the architecture and cannot be set by the file.
"""

from typing import Literal, NamedTuple

from moekit.config.balance import BiasBalance
from moekit.config.errors import ConfigError, check
from moekit.config.model import GQAConfig, Llama3Config, MLAConfig, ModelConfig, YarnConfig
from moekit.config.moe import MoEConfig

MOST_LAYERS, MOST_EXPERTS = 512, 1024
"""LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS: beyond them llama.cpp aborts."""

SMALLEST_EPSILON = 1e-12
"""llama.cpp adds nothing to the sum of the weights but keeps it above 6.1e-5; less than this is below float32's
resolution there."""


class Architecture(NamedTuple):
    """One of llama.cpp's architectures: what it can do, and what it always does."""

    name: str
    layout: Literal["half", "interleaved"]
    """which rotary dimensions turn together"""
    experts: Literal["none", "all", "after_dense"]
    """which layers have experts"""
    shared: Literal["none", "plain", "gated"] = "none"
    """shared experts; where they are plain, some must stand in the file"""
    normalised: bool | None = None
    """whether weights are divided by their sum; None: as the file says"""
    steered: bool = False
    """knows sigmoid scores and the selection bias"""
    scaled: bool = False
    """multiplies the weights by a factor"""
    wide_heads: bool = True
    """the heads may be wider or narrower together than the model"""
    out_bias: bool = False
    """may have a bias on the output projection"""
    own_head: bool = False
    """the head must stand in the file even where it is the embedding"""


DEEPSEEK2 = Architecture("deepseek2", "interleaved", "after_dense", "plain", steered=True, scaled=True)
DEEPSEEK = Architecture(
    "deepseek", "interleaved", "after_dense", "plain", normalised=False, scaled=True, wide_heads=False
)
MIXTRAL = Architecture("llama", "interleaved", "all", normalised=True, out_bias=True)
OLMOE = Architecture("olmoe", "half", "all", normalised=False, wide_heads=False, own_head=True)
QWEN2MOE = Architecture("qwen2moe", "half", "all", "gated", normalised=False, wide_heads=False, own_head=True)
QWEN3MOE = Architecture("qwen3moe", "half", "all", normalised=True)
LLAMA = Architecture("llama", "interleaved", "none", out_bias=True)
QWEN3 = Architecture("qwen3", "half", "none")


def architecture(config: ModelConfig) -> Architecture:
    """The architecture that computes what `config` describes; ConfigError names what llama.cpp does not do."""
    chosen = _closest(config)
    check(config.n_layers <= MOST_LAYERS, "n_layers", f"llama.cpp holds at most {MOST_LAYERS} layers")
    _check_attention(config, chosen)
    _check_positions(config, chosen)
    if config.moe_layers:
        _check_layers(config, chosen)
        _check_experts(config.moe, chosen)
        _check_groups(config.moe)
    return chosen


def _closest(config: ModelConfig) -> Architecture:
    attention, moe = config.attention, config.moe
    if isinstance(attention, MLAConfig):
        return DEEPSEEK2
    if attention.qk_norm == "full":
        return OLMOE
    if not config.moe_layers:
        return QWEN3 if attention.qk_norm == "head" else LLAMA
    if moe.shared_gate:
        return QWEN2MOE
    if attention.qk_norm == "head":
        return QWEN3MOE
    plain = moe.n_shared == 0 and not config.dense_layers and normalised(moe)
    return MIXTRAL if plain else DEEPSEEK


def normalised(moe: MoEConfig) -> bool:
    """Whether a token's weights sum to one. A softmax over the chosen is one over all, divided by its sum."""
    routing = moe.top_k_routing
    return routing.renormalise or (routing.order == "top_k_then_score" and routing.score == "softmax")


def _check_attention(config: ModelConfig, chosen: Architecture) -> None:
    attention = config.attention
    if isinstance(attention, MLAConfig):
        check(not attention.bias, "attention.bias", f"llama.cpp's {chosen.name} has no bias in its attention")
        _check_lite(config, attention)
        return
    check(chosen.out_bias or not attention.out_bias, "attention.out_bias", f"llama.cpp's {chosen.name} has none")
    check(attention.clip_qkv is None, "attention.clip_qkv", f"llama.cpp's {chosen.name} does not clip")
    heads = attention.n_heads * attention.head_dim
    message = f"{attention.n_heads} heads of {attention.head_dim} do not make up the width {config.width}"
    check(chosen.wide_heads or heads == config.width, "attention.head_dim", f"{message}, as {chosen.name} wants")
    norms = {
        "none": chosen not in (OLMOE, QWEN3MOE, QWEN3),
        "head": chosen in (QWEN3MOE, QWEN3),
        "full": _olmoe(config),
    }
    why = f"llama.cpp has no architecture with norms of this kind ({attention.qk_norm}) and the rest of this model"
    check(norms[attention.qk_norm], "attention.qk_norm", why)


def _olmoe(config: ModelConfig) -> bool:
    attention = config.attention
    return bool(config.moe_layers) and isinstance(attention, GQAConfig) and attention.n_kv_heads == attention.n_heads


def _check_lite(config: ModelConfig, attention: MLAConfig) -> None:
    """llama.cpp knows V2-Lite and its kin, which do not compress their queries, by their number of layers."""
    lite = config.n_layers in (26, 27) or (config.n_layers == 48 and config.vocab_size == 128256)
    message = f"llama.cpp takes deepseek2 with {config.n_layers} layers for V2-Lite, whose queries are not compressed"
    check(not lite or attention.q_lora_rank is None, "attention.q_lora_rank", message)


def _check_positions(config: ModelConfig, chosen: Architecture) -> None:
    scaling = config.rope.scaling
    if isinstance(scaling, Llama3Config):
        check(chosen.name == "llama", "rope.scaling.kind", f"llama.cpp's {chosen.name} has no scaling of this kind")
    if not isinstance(scaling, YarnConfig):
        return
    for key, fixed in (("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", True)):
        value = getattr(scaling, key)
        check(value == fixed, f"rope.scaling.{key}", f"{value} is not llama.cpp's {fixed}, which no file can change")


def _check_layers(config: ModelConfig, chosen: Architecture) -> None:
    dense = config.dense_layers
    if chosen.experts == "all":
        check(not dense, "dense_layers", f"llama.cpp's {chosen.name} has experts in every layer")
    check(dense == tuple(range(len(dense))), "dense_layers", "llama.cpp's dense layers all come first")


def _check_experts(moe: MoEConfig, chosen: Architecture) -> None:
    name, routing = f"llama.cpp's {chosen.name}", moe.top_k_routing
    check(moe.n_routed <= MOST_EXPERTS, "moe.n_routed", f"llama.cpp holds at most {MOST_EXPERTS} experts")
    check(chosen.shared != "none" or not moe.n_shared, "moe.n_shared", f"{name} has no shared experts")
    check(not moe.shared_average, "moe.shared_average", f"{name} adds shared experts as they are")
    limited = moe.capacity is not None and moe.capacity.in_evaluation
    check(not limited, "moe.capacity.in_evaluation", f"{name} drops no token")
    check(chosen.shared == "gated" or not moe.shared_gate, "moe.shared_gate", f"{name} has no gate on shared experts")
    fits = chosen.shared != "plain" or moe.shared_width % moe.expert_width == 0
    message = f"{name} holds shared experts of expert_width = {moe.expert_width} alone"
    check(fits, "moe.shared_expert_width", f"{message}, and {moe.shared_width} is no multiple")
    check(chosen.steered or routing.score == "softmax", "moe.routing.score", f"{name} knows softmax alone")
    biases = [rule for rule in moe.balance if isinstance(rule, BiasBalance)]
    added, biased = all(rule.update != "multiplicative" for rule in biases), bool(biases)
    check(added, "moe.balance.bias.update", f"{name} adds the bias, and does not multiply with it")
    check(chosen.steered or not biased, "moe.balance.bias", f"{name} has no selection bias")
    check(chosen.scaled or routing.scale == 1, "moe.routing.scale", f"{name} does not scale the weights")
    if chosen.normalised is not None and chosen.normalised != normalised(moe):
        verb = "always" if chosen.normalised else "never"
        raise ConfigError("moe.routing.renormalise", f"{name} {verb} divides the weights by their sum")
    small = not routing.renormalise or routing.epsilon <= SMALLEST_EPSILON
    check(small, "moe.routing.epsilon", f"{routing.epsilon} is more than llama.cpp adds, which is nothing")


def _check_groups(moe: MoEConfig) -> None:
    routing = moe.top_k_routing
    same = routing.top_k_groups == routing.n_groups or routing.group_score == "top2_sum"
    check(same, "moe.routing.group_score", "llama.cpp ranks groups by the sum of their two best experts alone")
