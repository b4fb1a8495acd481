"""Small models of many shapes, with no weight at its initial value."""

from typing import Any

import torch
from hypothesis import strategies as st

from moekit.config.balance import BiasBalance, RouterZLoss
from moekit.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting
from moekit.model.transformer import Transformer

YARN = YarnConfig(factor=4.0, original_max_positions=16, mscale=0.7, mscale_all_dim=0.9)
V2 = MoEConfig(expert_width=8, n_routed=8, top_k=3, routing=TopKRouting(n_groups=4, top_k_groups=2))


def moe(groups: int = 4, shared: int = 1, biased: bool = True, renormalise: bool = True) -> MoEConfig:
    routing = TopKRouting(
        score="sigmoid",
        renormalise=renormalise,
        epsilon=1e-20,
        scale=2.5,
        n_groups=groups,
        top_k_groups=max(groups // 2, 1),
        group_score="top2_sum",
    )
    balance = (BiasBalance(rate=0.01), RouterZLoss()) if biased else (RouterZLoss(),)
    return MoEConfig(expert_width=8, n_routed=8, n_shared=shared, top_k=3, routing=routing, balance=balance)


def small(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "vocab_size": 23,
        "width": 12,
        "n_layers": 3,
        "dense_width": 10,
        "attention": MLAConfig(n_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=5),
        "moe": moe(),
        "max_positions": 64,
    }
    return ModelConfig(**settings | changes)


def gqa(**changes: Any) -> ModelConfig:
    return small(attention=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=6), **changes)


def attention(q_lora_rank: int | None, bias: bool) -> MLAConfig:
    sizes = {"n_heads": 2, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5}
    return MLAConfig(**sizes, q_lora_rank=q_lora_rank, bias=bias)


shapes = st.fixed_dictionaries(
    {
        "q_lora_rank": st.sampled_from([None, 5]),
        "bias": st.booleans(),
        "n_dense": st.integers(0, 3),
        "groups": st.sampled_from([1, 2, 4]),
        "shared": st.integers(0, 2),
        "biased": st.booleans(),
        "renormalise": st.booleans(),
        "mtp": st.integers(0, 1),
        "tied": st.booleans(),
        "scaling": st.sampled_from([None, YARN]),
        "layout": st.sampled_from(["interleaved", "half"]),
    }
)
"""Models that the DeepSeek-V3 family expresses."""


def shaped(shape: dict[str, Any]) -> ModelConfig:
    return small(
        attention=attention(shape["q_lora_rank"], shape["bias"]),
        dense_layers=tuple(range(shape["n_dense"])),
        moe=moe(shape["groups"], shape["shared"], shape["biased"], shape["renormalise"]),
        mtp_depth=shape["mtp"],
        tie_embeddings=shape["tied"],
        rope=RopeConfig(theta=5000.0, layout=shape["layout"], scaling=shape["scaling"]),
    )


@torch.no_grad()
def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator).eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


def random_ids(vocab_size: int = 23) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 17), generator=torch.Generator().manual_seed(7))
