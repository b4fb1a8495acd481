"""Switch routing is that of transformers' Switch Transformers: expert, probability, jitter, and who is turned away."""

import pytest
import torch
from routing_cases import generator
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from moekit.config.capacity import ExpertCapacity
from moekit.config.moe import MoEConfig
from moekit.config.routing import SwitchRouting
from moekit.moe.router import Router
from moekit.moe.routing import Routing

N_SEQUENCES, LENGTH, WIDTH, N_EXPERTS = 3, 20, 12, 4


def tokens() -> torch.Tensor:
    return torch.randn(N_SEQUENCES, LENGTH, WIDTH, generator=generator(0))


def reference(jitter: float = 0.0, room: int = LENGTH) -> SwitchTransformersTop1Router:
    config = SwitchTransformersConfig(
        hidden_size=WIDTH,
        d_model=WIDTH,
        num_experts=N_EXPERTS,
        expert_capacity=room,
        router_jitter_noise=jitter,
        router_bias=False,
    )
    router = SwitchTransformersTop1Router(config)
    torch.nn.init.normal_(router.classifier.weight, generator=generator(1))
    return router


def ours(their: SwitchTransformersTop1Router, jitter: float = 0.0, capacity: ExpertCapacity | None = None) -> Router:
    routing = SwitchRouting(jitter=jitter)
    config = MoEConfig(width=WIDTH, n_routed=N_EXPERTS, top_k=1, routing=routing, capacity=capacity)
    router = Router(config)
    assert router.centroids is not None
    router.centroids.data.copy_(their.classifier.weight)
    return router


def assert_same(routing: Routing, their: tuple[torch.Tensor, ...]) -> None:
    """Expert, probability and logits of each token; theirs are one-hot."""
    one_hot, probability, logits = their
    torch.testing.assert_close(routing.logits, logits.flatten(0, 1))
    torch.testing.assert_close(routing.weights, probability.flatten(0, 1))
    assert torch.equal(routing.experts[:, 0], one_hot.flatten(0, 1).argmax(dim=-1))


def test_the_same_expert_with_the_same_probability() -> None:
    their = reference().eval()
    assert_same(ours(their).eval()(tokens().flatten(0, 1)), their(tokens()))


def test_the_same_jitter_from_the_same_seed() -> None:
    # Theirs multiplies its argument in place where that is float32; ours must not.
    their, x = reference(jitter=0.3).train(), tokens().flatten(0, 1)
    torch.manual_seed(5)
    expected = their(tokens())
    torch.manual_seed(5)
    routing = ours(their, jitter=0.3).train()(x)
    assert_same(routing, expected)
    assert not torch.allclose(routing.logits, x @ their.classifier.weight.T)
    assert torch.equal(x, tokens().flatten(0, 1))


@pytest.mark.parametrize("room", [1, 3, 5, LENGTH])
def test_full_experts_turn_away_the_same_tokens(room: int) -> None:
    their = reference(room=room).eval()
    # ceil(factor x tokens / experts) = room, whichever way the division rounds.
    factor = (room - 0.5) * N_EXPERTS / LENGTH
    capacity = ExpertCapacity(factor=factor, scope="sequence", drop="position", in_evaluation=True)
    routing = ours(their, capacity=capacity).eval()(tokens().flatten(0, 1), n_sequences=N_SEQUENCES)
    one_hot, probability, _ = their(tokens())
    kept = one_hot.flatten(0, 1).sum(dim=-1) > 0
    assert routing.served is not None
    assert torch.equal(routing.served[:, 0], torch.where(kept, one_hot.flatten(0, 1).argmax(dim=-1), -1))
    torch.testing.assert_close(routing.weights, probability.flatten(0, 1) * kept.unsqueeze(-1))
    assert (room == LENGTH) == bool(kept.all())
