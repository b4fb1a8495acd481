"""What training minimises: the next token, the token after it, and the balance of the experts."""

from typing import NamedTuple

import torch

from moekit.model.transformer import Transformer
from moekit.moe.balance import StepCount, active_rules
from moekit.moe.routing import Routing
from moekit.tensors import Float, Int, Tensor
from moekit.train.cross_entropy import linear_cross_entropy


class Objective(NamedTuple):
    """The loss of a micro-batch as its part of the step's, its terms, and the routings they come from."""

    loss: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    routings: tuple[Routing, ...]


StepCounts = dict[tuple[int, str], StepCount]
"""What rules of batch scope counted beforehand, by layer and kind."""


class Rows(NamedTuple):
    """A micro-batch: rows of two tokens more than are predicted, the task of each, and the seed of chance in it."""

    ids: Int[Tensor, "B W"]
    tasks: Int[Tensor, " B"] | None = None
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Where noise and chance in the routing come from: the same in every pass over these rows."""
        return torch.Generator(self.ids.device).manual_seed(self.seed)


def objective(model: Transformer, rows: Rows, mtp_weight: float, share: float, counts: StepCounts) -> Objective:
    """Mean next-token loss, `mtp_weight` times the loss of the token after it, and each layer's balance losses.

    All is multiplied by `share`, the micro-batch's share of the step,
    so that the gradients of micro-batches sum to the gradient of their union. Balance losses are summed over layers,
    as in DeepSeek's models; their reported terms are means over layers.
    """
    ids, generator = rows.ids, rows.generator()
    inputs, targets, after = ids[:, :-2], ids[:, 1:-1], ids[:, 2:]
    states, routings = model.hidden(inputs, tasks=rows.tasks, generator=generator)
    head, per_token = model.head.weight, share / inputs.numel()
    next_token = linear_cross_entropy(states.flatten(0, 1), head, targets.flatten()) * per_token
    terms = {"next_token": next_token}
    loss = next_token
    if model.mtp is not None:
        second = model.hidden_after_next(states, targets, tasks=rows.tasks, generator=generator)
        routings = (*routings, *second.routings)
        terms["mtp"] = linear_cross_entropy(second.states.flatten(0, 1), head, after.flatten()) * per_token
        loss = loss + mtp_weight * terms["mtp"]
    balance = balance_terms(model, routings, counts)
    for kind, values in balance.items():
        total = torch.stack(values).sum() * share
        loss = loss + total
        terms[kind] = total / len(values)
    return Objective(loss, {kind: term.detach() for kind, term in terms.items()}, routings)


def balance_terms(
    model: Transformer, routings: tuple[Routing, ...], counts: StepCounts
) -> dict[str, list[Float[Tensor, ""]]]:
    """The balance losses of every layer, by kind."""
    terms: dict[str, list[Tensor]] = {}
    for index, (layer, routing) in enumerate(zip(model.moe_layers(), routings, strict=True)):
        for kind, rule in active_rules(layer.balance):
            value = rule.loss(routing, counts.get((index, kind)))
            if value is not None:
                terms.setdefault(kind, []).append(value)
    return terms


@torch.no_grad()
def count_step(model: Transformer, micro_batches: list[Rows]) -> StepCounts:
    """What rules of batch scope must know of the whole step before its first gradient: one pass without gradients.

    Nothing is run where no rule asks, or where the step is one micro-batch and its routing is the whole step's.
    """
    rules = [
        (index, kind, rule)
        for index, layer in enumerate(model.moe_layers())
        for kind, rule in active_rules(layer.balance)
        if rule.counts_step
    ]
    counts: StepCounts = {}
    if not rules or len(micro_batches) == 1:
        return counts
    for rows in micro_batches:
        routings = _routings(model, rows)
        for index, kind, rule in rules:
            found = rule.count(routings[index])
            old = counts.get((index, kind), StepCount(torch.zeros_like(found), 0))
            counts[index, kind] = StepCount(old.counts + found, old.tokens + routings[index].experts.shape[0])
    return counts


def _routings(model: Transformer, rows: Rows) -> tuple[Routing, ...]:
    ids, tasks, generator = rows.ids, rows.tasks, rows.generator()
    states, routings = model.hidden(ids[:, :-2], tasks=tasks, generator=generator)
    if model.mtp is None:
        return routings
    second = model.hidden_after_next(states, ids[:, 1:-1], tasks=tasks, generator=generator)
    return (*routings, *second.routings)
