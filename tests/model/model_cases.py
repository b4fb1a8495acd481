"""Small models that several tests share."""

from typing import Any

import torch
from torch import Tensor

from moekit.config.balance import BiasBalance
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.model.norm import RMSNorm
from moekit.model.transformer import Transformer

ROUTING = TopKRouting(
    score="sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, n_groups=4, top_k_groups=2, group_score="top2_sum"
)
MLA = {"n_heads": 2, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = YarnConfig(factor=40.0, original_max_positions=16, mscale=0.707, mscale_all_dim=0.707)
ATTENTIONS = {
    "mla": MLAConfig(**MLA),
    "mla-compressed-query": MLAConfig(**MLA, q_lora_rank=5),
    "mla-bias": MLAConfig(**MLA, q_lora_rank=5, bias=True),
    "mla-narrow-value": MLAConfig(**MLA | {"v_head_dim": 3}),
    "mla-equal-value": MLAConfig(**MLA | {"v_head_dim": 8}),
    "mla-wide-value": MLAConfig(**MLA | {"v_head_dim": 11}),
    "gqa": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6),
    "gqa-one-head-of-keys": GQAConfig(n_heads=3, n_kv_heads=1, head_dim=4, qkv_bias=True, out_bias=True),
    "gqa-norm-of-heads": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm="head"),
    "gqa-norm-of-all": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm="full"),
    "gqa-clipped": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6, qk_norm="full", clip_qkv=0.5),
    "mha": GQAConfig(n_heads=3, n_kv_heads=3, head_dim=4),
}
ROPES = {
    "half": RopeConfig(layout="half"),
    "interleaved": RopeConfig(layout="interleaved"),
    "yarn": RopeConfig(layout="interleaved", scaling=YARN),
}


def small_config(attention: str = "mla", rope: str = "interleaved", **settings: Any) -> ModelConfig:
    moe = MoEConfig(expert_width=5, n_routed=8, top_k=3, routing=ROUTING, balance=(BiasBalance(),))
    defaults = {"vocab_size": 19, "width": 12, "n_layers": 2, "dense_layers": (0,), "dense_width": 10, "moe": moe}
    return ModelConfig(**defaults | settings, attention=ATTENTIONS[attention], rope=ROPES[rope])


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int, std: float = 0.3) -> None:
    """Weights large enough that every part of the model shows in its output; norms around 1; biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(part.weight) for part in module.modules() if isinstance(part, RMSNorm)}
    for parameter in module.parameters():
        parameter.normal_(1.0 if id(parameter) in norms else 0.0, std, generator=generator)


def small_model(seed: int, attention: str = "mla", rope: str = "interleaved", **settings: Any) -> Transformer:
    model = Transformer(small_config(attention, rope, **settings)).eval()
    randomise(model, seed)
    return model


def random_ids(seed: int, *shape: int, vocab_size: int = 19) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
