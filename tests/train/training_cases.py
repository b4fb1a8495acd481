from dataclasses import replace
from typing import Any

from moekit.config.balance import BiasBalance, ExpertLoss, SequenceLoss
from moekit.config.model import MLAConfig, ModelConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import TopKRouting


def small_model(**changes: Any) -> ModelConfig:
    model = ModelConfig(
        vocab_size=300,
        width=32,
        n_layers=3,
        dense_layers=(0,),
        dense_width=48,
        attention=MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12),
        moe=MoEConfig(
            expert_width=16,
            n_routed=8,
            top_k=2,
            routing=TopKRouting(
                score="sigmoid",
                renormalise=True,
                epsilon=1e-20,
                scale=2.5,
                n_groups=4,
                top_k_groups=2,
                group_score="top2_sum",
            ),
            balance=(
                BiasBalance(rate=0.01),
                SequenceLoss(coefficient=0.01),
                ExpertLoss(coefficient=0.02, scope="batch"),
            ),
        ),
        mtp_depth=1,
        max_positions=128,
    )
    return replace(model, **changes)
