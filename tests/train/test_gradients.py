from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from training_cases import small_model

from moekit.config import balance
from moekit.config.balance import CommunicationLoss, DeviceLoss, ExpertLoss, RouterZLoss, SequenceLoss
from moekit.config.routing import TaskRouting, TopKRouting
from moekit.config.run import RunConfig
from moekit.model.transformer import Transformer
from moekit.train.objective import Rows, objective
from moekit.train.step import Stepper

RULES = (
    SequenceLoss(coefficient=0.1),
    RouterZLoss(coefficient=0.1),
    *(ExpertLoss(coefficient=0.1, scope=scope) for scope in ("sequence", "batch")),
    *(DeviceLoss(coefficient=0.1, scope=scope, n_devices=4) for scope in ("sequence", "batch")),
    *(CommunicationLoss(coefficient=0.1, scope=s, n_devices=4, max_devices=2) for s in ("sequence", "batch")),
    *(
        cls(coefficient=0.1, scope=scope)
        for cls in (balance.FirstChoiceLoss, balance.ImportanceLoss, balance.VarianceLoss)
        for scope in ("sequence", "batch")
    ),
    balance.EntropyLoss(coefficient=0.1),
    balance.CommonMassLoss(coefficient=0.1),
)
"""All but `load_loss`: its routing draws noise, and draws otherwise in other micro-batches."""


def test_no_rule_is_forgotten() -> None:
    assert {type(rule) for rule in RULES} == {*get_args(balance.BalanceRule)} - {balance.LoadLoss, balance.BiasBalance}


def gradients(
    config: RunConfig, micro_batch: int, ids: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    config = replace(
        config, train=replace(config.train, micro_batch=micro_batch), optim=replace(config.optim, clip=0.0)
    )
    stepper = Stepper(config, Transformer(config.model, torch.Generator().manual_seed(0)))
    figures = stepper.gradients(ids)
    return {name: p.grad for name, p in stepper.weights.masters.items() if p.grad is not None}, figures.losses


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{getattr(rule, 'scope', '')}")
def test_one_micro_batch_of_8_and_4_of_2_give_the_same_gradient(small_run: RunConfig, rule: Any) -> None:
    routing = TaskRouting(n_common=2) if "task" in rule.needs_kind else TopKRouting()
    moe = replace(small_run.model.moe, routing=routing, balance=(rule,))
    config = replace(small_run, model=small_model(moe=moe))
    ids = torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(3))
    whole, losses = gradients(config, 0, ids)
    parts, losses_of_parts = gradients(config, 2, ids)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)
    assert losses_of_parts == pytest.approx(losses, rel=1e-5)


def test_the_objective_is_the_mean_of_the_next_token_and_the_weighted_one_after_it(small_run: RunConfig) -> None:
    model = Transformer(small_model(moe=replace(small_run.model.moe, balance=())), torch.Generator().manual_seed(0))
    ids = torch.randint(0, 300, (2, 18), generator=torch.Generator().manual_seed(3))
    found = objective(model, Rows(ids), 0.3, 1.0, {})
    logits = model(ids[:, :16]).logits
    states = model.hidden(ids[:, :16]).states
    second = model.head(model.hidden_after_next(states, ids[:, 1:17]).states)
    next_token = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:17].flatten())
    after = F.cross_entropy(second.flatten(0, 1), ids[:, 2:18].flatten())
    torch.testing.assert_close(found.loss, next_token + 0.3 * after)
    torch.testing.assert_close(found.terms["mtp"], after.detach())


def test_bfloat16_gradients_point_where_those_of_float32_do(small_run: RunConfig) -> None:
    ids = torch.randint(0, 300, (8, 18), generator=torch.Generator().manual_seed(3))
    exact, _ = gradients(small_run, 0, ids)
    rounded, _ = gradients(replace(small_run, train=replace(small_run.train, dtype="bfloat16")), 0, ids)
    flat = [torch.cat([g[name].flatten() for name in exact]) for g in (exact, rounded)]
    assert F.cosine_similarity(flat[0], flat[1], dim=0) > 0.99


def test_balance_losses_sum_over_layers_and_are_reported_as_their_mean(small_run: RunConfig) -> None:
    rule = RouterZLoss(coefficient=1.0)
    config = small_model(moe=replace(small_run.model.moe, balance=(rule,)), mtp_depth=0)
    model = Transformer(config, torch.Generator().manual_seed(0))
    ids = torch.randint(0, 300, (2, 18), generator=torch.Generator().manual_seed(3))
    found = objective(model, Rows(ids), 0.3, 1.0, {})
    layers = [r.logits.logsumexp(-1).square().mean() for r in found.routings]
    torch.testing.assert_close(found.loss - found.terms["next_token"], torch.stack(layers).sum())
    torch.testing.assert_close(found.terms["z_loss"], torch.stack(layers).mean().detach())
