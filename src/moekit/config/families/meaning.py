"""When two configurations describe the same model: their fields that have no effect at one value."""

from dataclasses import replace

from moekit.config.model import GQAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.config.moe import MoEConfig
from moekit.config.routing import Routing, TopKRouting


def meaning(config: ModelConfig) -> ModelConfig:
    """The configuration with its fields that have no effect at their defaults.

    Configurations of equal meaning have tensors of equal names and shapes, compute the same from them, and are trained
    alike.
    """
    return replace(
        config,
        dense_width=config.dense_width if config.dense_layers else 1,
        rope=_positions(config.rope, latent=not isinstance(config.attention, GQAConfig)),
        moe=_mixture(config.moe) if config.moe_layers else MoEConfig(),
    )


def _positions(rope: RopeConfig, latent: bool) -> RopeConfig:
    """A factor of cosines and sines that is given takes the place of the temperatures it is computed from."""
    yarn = rope.scaling
    if not isinstance(yarn, YarnConfig) or yarn.attention_factor is None:
        return rope
    return replace(rope, scaling=replace(yarn, mscale=1.0, mscale_all_dim=yarn.mscale_all_dim if latent else 1.0))


def _mixture(moe: MoEConfig) -> MoEConfig:
    """Shared experts are fused into one block: its width counts, not how many they are."""
    width = moe.shared_width
    return replace(moe, width=0, n_shared=min(width, 1), shared_expert_width=width, routing=_choice(moe.routing))


def _choice(routing: Routing) -> Routing:
    """A softmax among the chosen experts is that over all, divided by the sum of the chosen."""
    if not isinstance(routing, TopKRouting):
        return routing
    if routing.top_k_groups == routing.n_groups:
        routing = replace(routing, n_groups=1, top_k_groups=1, group_score="max")
    late = routing.score == "softmax" and routing.order == "top_k_then_score"
    if late and (not routing.renormalise or routing.epsilon == 0):
        routing = replace(routing, order="score_then_top_k", renormalise=True, epsilon=0.0)
    return routing if routing.renormalise else replace(routing, epsilon=0.0)
