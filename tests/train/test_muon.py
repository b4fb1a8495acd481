import pytest
import torch

from moekit.config.run import OptimConfig
from moekit.train.muon import Muon, orthogonalise
from moekit.train.optimizer import Optimizers, muon_groups, schedule


def stepped(parameter: torch.Tensor, gradients: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def torch_muon(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    parameter = start.clone().requires_grad_()
    oracle = torch.optim.Muon([parameter], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return stepped(parameter, gradients, oracle)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_a_matrix_moves_as_in_torchs_muon(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    ours = start.clone().requires_grad_()
    found = stepped(ours, gradients, Muon([{"params": [ours]}], lr=0.02, momentum=0.9, weight_decay=0.1))
    moved = torch_muon(start, gradients) - start
    assert (found - start - moved).norm() < 0.02 * moved.norm()


def test_a_stack_moves_as_each_of_its_matrices_and_gate_apart_from_up() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, 8, 12, generator=generator)
    gradients = [torch.randn(3, 8, 12, generator=generator) for _ in range(2)]
    ours = start.clone().requires_grad_()
    found = stepped(ours, gradients, Muon([{"params": [ours], "parts": 2}], lr=0.02, momentum=0.9, weight_decay=0.1))
    for expert in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            one = start[expert, rows]
            moved = torch_muon(one, [g[expert, rows] for g in gradients]) - one
            assert (found[expert, rows] - one - moved).norm() < 0.02 * moved.norm()


def test_orthogonalising_brings_singular_values_near_one() -> None:
    x = torch.randn(5, 8, 20, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalise(x, 5))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_parameter_without_gradient_stays() -> None:
    parameter = torch.ones(4, 4, requires_grad=True)
    Muon([{"params": [parameter]}], lr=1.0).step()
    assert torch.equal(parameter.detach(), torch.ones(4, 4))


def test_embedding_head_and_router_are_left_to_adamw() -> None:
    names = ["embedding.weight", "head.weight", "layers.1.feed_forward.router.centroids", "norm.weight"]
    matrices = ["layers.1.feed_forward.experts.gate_up", "layers.0.attention.q.weight"]
    parameters = {name: torch.ones(4, 4) if name != "norm.weight" else torch.ones(4) for name in names + matrices}
    chosen = {name for group in muon_groups(parameters) for name in group["names"]}
    assert chosen == set(matrices)
    held = [p for part in Optimizers(OptimConfig(), parameters).parts for g in part.param_groups for p in g["params"]]
    assert sorted(map(id, held)) == sorted(map(id, parameters.values()))


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_the_learning_rate_warms_up_and_ends_at_its_final_share(kind: str) -> None:
    config = OptimConfig(schedule=kind, warmup_steps=10, final_share=0.1)  # type: ignore[arg-type]
    rates = [schedule(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule(config, 100, 100) == pytest.approx(0.1)
