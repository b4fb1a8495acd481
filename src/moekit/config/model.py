"""The transformer: its shape, its attention, its positions, and which layers are mixtures of experts."""

from dataclasses import dataclass, field, replace
from typing import Literal

from moekit.config.balance import BalanceRule, BiasBalance
from moekit.config.errors import ConfigError, check, check_not_negative, check_positive
from moekit.config.moe import MoEConfig
from moekit.config.routing import HashRouting


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN: positions beyond those seen in training (arXiv 2309.00071).

    Cosines and sines are multiplied by `attention_factor`. Latent attention also multiplies the softmax's scale by the
    square of the temperature of mscale_all_dim, as DeepSeek-V2 and V3 do.
    """

    kind: Literal["yarn"] = "yarn"
    factor: float = 40.0
    """how many times longer the context becomes"""
    original_max_positions: int = 4096
    """the context before extension"""
    beta_fast: float = 32.0
    """rotations over the original context above which a frequency stays as it is"""
    beta_slow: float = 1.0
    """rotations below which a frequency is divided by the factor"""
    mscale: float = 1.0
    """attention temperature of the cosines and sines, relative to mscale_all_dim"""
    mscale_all_dim: float = 1.0
    """attention temperature of the whole softmax; it enters squared"""
    attention_factor: float | None = None
    """factor of the cosines and sines; none: the ratio of both temperatures"""
    truncate: bool = True
    """round the dimensions between which the ramp runs to whole ones"""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "original_max_positions", "beta_fast", "beta_slow")
        check_not_negative(self, "mscale", "mscale_all_dim")
        given = self.attention_factor
        check(given is None or given > 0, "attention_factor", f"{given} must be above 0, or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Linear interpolation of positions: every frequency divided by one factor (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = 2.0
    """how many times longer the context becomes"""

    def __post_init__(self) -> None:
        check_positive(self, "factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Config:
    """Interpolation of slow frequencies alone, as Llama 3.1 does it (arXiv 2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    """how many times longer the context becomes"""
    original_max_positions: int = 8192
    """the context before extension"""
    low_freq_factor: float = 1.0
    """rotations over the original context below which a frequency is divided by the factor"""
    high_freq_factor: float = 4.0
    """rotations above which a frequency stays as it is"""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "original_max_positions", "low_freq_factor")
        above = self.high_freq_factor > self.low_freq_factor
        check(above, "high_freq_factor", f"must be above low_freq_factor = {self.low_freq_factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864)."""

    theta: float = 10000.0
    """base of the wavelengths"""
    layout: Literal["half", "interleaved"] = "interleaved"
    """which dimensions turn together: i and i + d/2 (Llama), or 2i and 2i + 1 (DeepSeek's MLA)"""
    scaling: YarnConfig | LinearConfig | Llama3Config | None = None
    """context extension, or none"""

    def __post_init__(self) -> None:
        check_positive(self, "theta")
        # YaRN divides by the logarithm of theta.
        check(not isinstance(self.scaling, YarnConfig) or self.theta > 1, "theta", "must be above 1 for YaRN")


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAConfig:
    """Multi-head latent attention (arXiv 2405.04434, eqs 9-19)."""

    kind: Literal["mla"] = "mla"
    n_heads: int = 4
    """attention heads"""
    q_lora_rank: int | None = None
    """rank of the compressed query; none: a plain projection"""
    kv_lora_rank: int = 64
    """rank of the latent that keys and values come from"""
    qk_nope_head_dim: int = 32
    """width of a head's query and key without position"""
    qk_rope_head_dim: int = 16
    """width of the rotary query and of the rotary key all heads share"""
    v_head_dim: int = 32
    """width of a head's value"""
    bias: bool = False
    """bias on the compressing and the output projections"""

    def __post_init__(self) -> None:
        check_positive(self, "n_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        check(self.q_lora_rank is None or self.q_lora_rank > 0, "q_lora_rank", "must be above 0, or none")
        check_even(self.qk_rope_head_dim, "qk_rope_head_dim")

    @property
    def rotary_width(self) -> int:
        """How much of a head is turned by its position."""
        return self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class GQAConfig:
    """Grouped-query attention (arXiv 2305.13245); as many key-value heads as heads is plain multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    n_heads: int = 4
    """query heads"""
    n_kv_heads: int = 4
    """key and value heads, each shared by n_heads / n_kv_heads query heads"""
    head_dim: int = 32
    """width of a head"""
    qkv_bias: bool = False
    """bias on the query, key and value projections"""
    out_bias: bool = False
    """bias on the output projection"""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: of each head (Qwen3) or of all heads at once (OLMoE)"""
    clip_qkv: float | None = None
    """largest magnitude of the elements of queries, keys and values (OLMoE), or none"""

    def __post_init__(self) -> None:
        check_positive(self, "n_heads", "n_kv_heads", "head_dim")
        check(self.clip_qkv is None or self.clip_qkv > 0, "clip_qkv", f"{self.clip_qkv} must be above 0, or none")
        fits = self.n_heads % self.n_kv_heads == 0
        check(fits, "n_kv_heads", f"{self.n_kv_heads} does not divide n_heads = {self.n_heads}")
        check_even(self.head_dim, "head_dim")

    @property
    def rotary_width(self) -> int:
        """How much of a head is turned by its position."""
        return self.head_dim


def check_even(width: int, key: str) -> None:
    """Rotary widths come in pairs."""
    check(width % 2 == 0, key, f"{width} must be even: rotary dimensions turn in pairs", f"choose {width + 1}")


Attention = MLAConfig | GQAConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder of `n_layers` blocks, each attention and a feed-forward that is dense or a mixture of experts."""

    vocab_size: int = 4096
    """number of token ids"""
    width: int = 256
    """width of the residual stream"""
    n_layers: int = 4
    """blocks"""
    dense_layers: tuple[int, ...] = (0,)
    """layers, counted from 0, whose feed-forward is dense"""
    dense_width: int = 512
    """inner width of a dense feed-forward"""
    attention: Attention = MLAConfig()
    """how tokens see each other"""
    rope: RopeConfig = RopeConfig()
    """positions"""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """the other layers' feed-forward"""
    mtp_depth: int = 0
    """multi-token prediction modules: 0 or 1 (arXiv 2412.19437, section 2.2)"""
    tie_embeddings: bool = False
    """use the embedding as the head"""
    norm_epsilon: float = 1e-6
    """added to the mean square in RMSNorm"""
    max_positions: int = 4096
    """longest context the model is meant for"""
    init_std: float = 0.02
    """standard deviation of initial weights"""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "n_layers", "dense_width", "max_positions", "norm_epsilon")
        check_not_negative(self, "init_std")
        check(self.mtp_depth in (0, 1), "mtp_depth", f"{self.mtp_depth} is not 0 or 1")
        ordered = list(self.dense_layers) == sorted(set(self.dense_layers))
        check(ordered, "dense_layers", "must be in rising order, each layer once")
        inside = all(0 <= layer < self.n_layers for layer in self.dense_layers)
        check(inside, "dense_layers", f"{list(self.dense_layers)} reaches outside the {self.n_layers} layers")
        for rule in self.moe.balance:
            rates = len(getattr(rule, "layer_rates", ()))
            wanted = len(self.moe_layers) + (self.mtp_depth if self.moe_layers else 0)
            message = f"{rates} rates for {wanted} mixture-of-experts layers"
            check(rates in (0, wanted), f"moe.balance.{rule.kind}.layer_rates", message)
        if self.moe.width not in (0, self.width):
            raise ConfigError("moe.width", f"{self.moe.width} differs from the model's width = {self.width}")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers, counted from 0, whose feed-forward is a mixture of experts."""
        dense = set(self.dense_layers)
        return tuple(layer for layer in range(self.n_layers) if layer not in dense)

    @property
    def moe_block(self) -> MoEConfig:
        """The mixture-of-experts layer with the model's width and vocabulary filled in."""
        routing = self.moe.routing
        if isinstance(routing, HashRouting) and routing.vocab_size == 0:
            routing = replace(routing, vocab_size=self.vocab_size)
        return replace(self.moe, width=self.width, routing=routing)

    def moe_block_at(self, layer: int) -> MoEConfig:
        """That of the layer `layer`; the prediction module is the layer after the last."""
        moe, place = self.moe_block, sum(each < layer for each in self.moe_layers)
        return replace(moe, balance=tuple(_at(rule, place) for rule in moe.balance))


def _at(rule: BalanceRule, place: int) -> BalanceRule:
    """The rule as it is in the layer that comes at `place` among those with experts."""
    rates = rule.layer_rates if isinstance(rule, BiasBalance) else ()
    return replace(rule, rate=rates[place], layer_rates=()) if rates else rule
