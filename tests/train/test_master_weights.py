"""Float32 masters of a bfloat16 model: their gradients, their steps, and the roundings that the model computes with."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from moekit.config.run import RunConfig
from moekit.model.transformer import Transformer
from moekit.train.optimizer import adam_groups
from moekit.train.step import Stepper


def ids() -> torch.Tensor:
    return torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(3))


def stepper(config: RunConfig, dtype: str = "bfloat16", micro_batch: int = 0, kind: str = "adamw") -> Stepper:
    train = replace(config.train, dtype=dtype, micro_batch=micro_batch)  # type: ignore[arg-type]
    config = replace(config, train=train, optim=replace(config.optim, kind=kind))  # type: ignore[arg-type]
    return Stepper(config, Transformer(config.model, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("micro_batch", "expected"), [(0, torch.bfloat16), (4, torch.float32)])
def test_gradients_are_summed_in_float32_where_there_is_a_sum(
    small_run: RunConfig, micro_batch: int, expected: torch.dtype
) -> None:
    run = stepper(small_run, micro_batch=micro_batch)
    run.gradients(ids())
    assert {p.grad.dtype for p in run.weights.masters.values() if p.grad is not None} == {expected}
    assert all(p.grad is None for p in run.weights.working.values())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_the_model_computes_with_the_roundings_of_its_masters(
    small_run: RunConfig, kind: str, micro_batch: int
) -> None:
    run = stepper(small_run, micro_batch=micro_batch, kind=kind)
    before = {name: p.detach().clone() for name, p in run.weights.working.items()}
    for number in range(3):
        run.step(ids(), number)
        for name, working in run.weights.working.items():
            assert torch.equal(working, run.weights.masters[name].bfloat16()), name
    assert not all(torch.equal(p, before[name]) for name, p in run.weights.working.items())


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize(("dtype", "micro_batch"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 4)])
def test_steps_equal_those_of_torchs_adamw_on_clipped_float32_gradients(
    small_run: RunConfig, dtype: str, micro_batch: int, clip: float
) -> None:
    config = replace(small_run, optim=replace(small_run.optim, clip=clip))
    run = stepper(config, dtype, micro_batch)
    twins = {name: p.detach().clone().requires_grad_() for name, p in run.weights.masters.items()}
    optim = config.optim
    groups = adam_groups(twins, optim, optim.lr)
    adam = torch.optim.AdamW(groups, optim.lr, (optim.beta1, optim.beta2), eps=1e-10, fused=True)
    for number in range(3):
        figures = run.gradients(ids(), number=number)
        for name, master in run.weights.masters.items():
            twins[name].grad = None if master.grad is None else master.grad.float().clone()
        norm = nn.utils.get_total_norm([p.grad for p in twins.values() if p.grad is not None])
        assert figures.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
        run.weights.clear()
        if clip:
            assert norm > clip
            nn.utils.clip_grads_with_norm_(twins.values(), clip, norm)
        factor = run.step(ids(), number).learning_rate / optim.lr
        for group in adam.param_groups:
            group["lr"] = optim.lr * factor
        adam.step()
        for name, twin in twins.items():
            torch.testing.assert_close(run.weights.masters[name].detach(), twin.detach(), rtol=1e-5, atol=1e-6)


def test_the_optimizers_state_has_the_names_of_torchs(small_run: RunConfig) -> None:
    run = stepper(small_run)
    run.step(ids(), 0)
    (part,) = run.optimizers.parts
    for parameter, entries in part.state.items():
        assert entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert entries["exp_avg"].dtype == entries["exp_avg_sq"].dtype == torch.float32
        assert entries["exp_avg"].shape == parameter.shape
        assert entries["step"].item() == 1
