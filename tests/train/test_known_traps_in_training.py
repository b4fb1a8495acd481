"""Where training of mixtures goes wrong (docs/traps.md): the traps that no other test of training closes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from training_cases import small_model

from moekit.config.balance import BalanceRule, BiasBalance, DeviceLoss, ExpertLoss, RouterZLoss, SequenceLoss
from moekit.config.presets.load import load_run, preset_names
from moekit.config.run import RunConfig
from moekit.evaluate.loss import sequence_nll
from moekit.model.transformer import Transformer
from moekit.train.step import Stepper

LOSSES = [
    ExpertLoss(coefficient=0.5),
    DeviceLoss(coefficient=0.5, n_devices=4),
    SequenceLoss(coefficient=0.5),
    RouterZLoss(coefficient=0.5),
]


def ids(rows: int = 8) -> torch.Tensor:
    return torch.randint(0, 300, (rows, 18), generator=torch.Generator().manual_seed(3))


def stepper(config: RunConfig) -> Stepper:
    return Stepper(config, Transformer(config.model, torch.Generator().manual_seed(0)))


def balanced(config: RunConfig, *rules: BalanceRule) -> RunConfig:
    return replace(config, model=small_model(moe=replace(config.model.moe, balance=rules)))


def biases(run: Stepper) -> list[torch.Tensor]:
    return [layer.balance["bias"].bias().clone() for layer in run.model.moe_layers()]


def router_gradient(run: Stepper, rows: torch.Tensor) -> torch.Tensor:
    run.gradients(rows)
    gradient = run.weights.masters["layers.1.feed_forward.router.centroids"].grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("rule", LOSSES, ids=lambda rule: rule.kind)
def test_every_loss_in_the_configuration_is_in_the_objective_and_in_the_figures(
    small_run: RunConfig, rule: BalanceRule
) -> None:
    without, run = stepper(balanced(small_run)), stepper(balanced(small_run, rule))
    assert not torch.equal(router_gradient(without, ids()), router_gradient(run, ids()))
    run.weights.clear()
    losses = run.step(ids(), 0).losses
    assert losses.keys() == {"next_token", "mtp", rule.kind}
    assert losses[rule.kind] > 0


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_with_experts_balances_them(name: str) -> None:
    model = load_run(name).model
    if model.moe_layers:
        assert {rule.kind for rule in model.moe.balance} & {"bias", "expert_loss"}


@pytest.mark.parametrize("rule", LOSSES, ids=lambda rule: rule.kind)
def test_a_batch_given_twice_has_the_same_loss_and_gradient(small_run: RunConfig, rule: BalanceRule) -> None:
    config = balanced(small_run, rule)
    once, twice = stepper(config), stepper(config)
    one, two = router_gradient(once, ids()), router_gradient(twice, torch.cat([ids(), ids()]))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_the_bias_moves_alike_however_a_batch_is_cut(small_run: RunConfig) -> None:
    found = []
    for micro_batch in (0, 4, 1):
        run = stepper(replace(small_run, train=replace(small_run.train, micro_batch=micro_batch)))
        run.step(ids(), 0)
        found.append(biases(run))
    assert all(bias.any() for bias in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_bias_moves_after_the_optimizer_step_and_not_in_a_pass(small_run: RunConfig) -> None:
    run = stepper(replace(small_run, train=replace(small_run.train, micro_batch=2)))
    run.gradients(ids())
    assert not any(bias.any() for bias in biases(run))


def test_the_bias_of_a_bfloat16_run_is_float32_and_moves_by_its_whole_rate(small_run: RunConfig) -> None:
    config = balanced(small_run, BiasBalance(rate=0.001))
    run = stepper(replace(config, train=replace(config.train, dtype="bfloat16")))
    for layer in run.model.moe_layers():
        layer.balance["bias"].bias().data.fill_(0.5)
    run.step(ids(), 0)
    for bias in biases(run):
        assert bias.dtype == torch.float32
        moved = (bias - 0.5).abs()
        assert set((moved * 1000).round().tolist()) <= {0.0, 1.0}
        assert moved.any()


def test_validation_between_steps_changes_no_later_number(small_run: RunConfig) -> None:
    quiet, watched = stepper(small_run), stepper(small_run)
    for number in range(3):
        sequence_nll(watched.model, np.arange(200) % 300, 0, 16, 16)
        one, other = quiet.step(ids(), number), watched.step(ids(), number)
        assert one.losses == other.losses
    theirs = watched.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in quiet.model.state_dict().items())


def test_a_layer_whose_bias_rests_leaves_the_others_theirs(small_run: RunConfig) -> None:
    run = stepper(balanced(small_run, BiasBalance(layer_rates=(0.0, 0.01, 0.02))))
    run.step(ids(), 0)
    still, *moving = biases(run)
    assert not still.any()
    assert [float(bias.abs().max()) for bias in moving] == pytest.approx([0.01, 0.02])


def test_experts_that_no_token_reaches_train_without_harm(small_run: RunConfig) -> None:
    run = stepper(small_run)
    for layer in run.model.moe_layers():
        layer.balance["bias"].bias().data.copy_(torch.tensor([9.0] * 4 + [-9.0] * 4))
    before = run.weights.masters["layers.1.feed_forward.experts.down"].detach().clone()
    figures = run.step(ids(), 0)
    after = run.weights.masters["layers.1.feed_forward.experts.down"].detach()
    assert not figures.observed[0].load[4:].any()
    assert after.isfinite().all()
    assert not torch.equal(before[:4], after[:4])
