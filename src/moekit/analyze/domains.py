"""Trace which expert serves which token, for texts of several domains."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from moekit.config.errors import InputError
from moekit.model.transformer import Transformer
from moekit.moe.stats import gate_mass


class DomainTrace(NamedTuple):
    """The routing of T tokens in L mixture-of-experts layers; each token belongs to one of N domains.

    Empty slots in `experts` are -1. `counts` and `gate_mass` are sums over the tokens of a domain.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    """the layers' numbers in the model, counted from 0"""
    labels: Int[np.ndarray, " T"]
    """the domain of each token"""
    experts: Int[np.ndarray, "L T K"]
    tokens: Int[np.ndarray, " N"]
    counts: Int[np.ndarray, "N L E"]
    gate_mass: Float[np.ndarray, "N L E"]


def trace(
    model: Transformer,
    domains: Mapping[str, np.ndarray],
    sequence_length: int,
    max_tokens: int = 20_000,
    batch: int = 8,
    seed: int = 0,
) -> DomainTrace:
    """Route up to `max_tokens` token ids of each domain, in whole sequences drawn without overlap."""
    layers, n_experts = model.config.moe_layers, model.config.moe.n_choices
    rng = np.random.default_rng(seed)
    chosen, labels = [], []
    mass = np.zeros((len(domains), len(layers), n_experts))
    for index, (name, ids) in enumerate(domains.items()):
        if len(ids) == 0:
            raise InputError(f"domain `{name}` has no tokens to trace", "give it a longer text")
        sequences = draw_sequences(ids, sequence_length, max_tokens, rng)
        labels.append(np.full(sequences.size, index))
        for experts, weights in _route(model, sequences, batch, index):
            chosen.append(experts)
            mass[index] += weights
    most = max((experts.shape[-1] for experts in chosen), default=1)
    assigned = np.concatenate([np.zeros((len(layers), 0, most), np.int32), *(_filled(e, most) for e in chosen)], axis=1)
    label = np.concatenate([np.zeros(0, dtype=np.int64), *labels])
    counts = count_assignments(assigned, label, len(domains), n_experts)
    tokens = np.bincount(label, minlength=len(domains))
    return DomainTrace(tuple(domains), layers, label, assigned, tokens, counts, mass)


def draw_sequences(ids: np.ndarray, length: int, max_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Some of the sequences that `ids` can be cut into, in their order; one shorter one if the text is that short."""
    length = min(length, max_tokens, len(ids))
    n_sequences = len(ids) // length
    rows = np.sort(rng.permutation(n_sequences)[: max_tokens // length])
    return np.asarray(ids[: n_sequences * length]).reshape(n_sequences, length)[rows]


def count_assignments(
    experts: Int[np.ndarray, "L T K"], labels: Int[np.ndarray, " T"], n_domains: int, n_experts: int
) -> Int[np.ndarray, "{n_domains} L {n_experts}"]:
    """How many slots of each domain's tokens went to each expert."""
    width = n_experts + 1
    # Empty slots (-1) fall into a column of their own, cut off below.
    first = labels[:, None] * width + 1
    counts = [np.bincount((layer + first).ravel(), minlength=n_domains * width) for layer in experts]
    table = np.array(counts, dtype=np.int64).reshape(len(counts), n_domains, width)
    return table[:, :, 1:].swapaxes(0, 1)


def _route(
    model: Transformer, sequences: np.ndarray, batch: int, domain: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each batch, the experts of its tokens [L T K] and the weight with which each expert was used [L E]."""
    device, n_experts = model.embedding.weight.device, model.config.moe.n_choices
    for start in range(0, len(sequences), batch):
        ids = torch.from_numpy(sequences[start : start + batch].astype(np.int64)).to(device)
        with torch.inference_mode():
            routings = model.hidden(ids, tasks=torch.full((len(ids),), domain, device=device)).routings
        experts = [routing.experts.cpu().numpy().astype(np.int32) for routing in routings]
        most = max((places.shape[-1] for places in experts), default=1)
        weights = [gate_mass(routing).cpu().numpy() for routing in routings]
        yield (
            np.array([_filled(places, most) for places in experts], np.int32).reshape(len(routings), ids.numel(), most),
            np.array(weights).reshape(len(routings), n_experts),
        )


def _filled(experts: np.ndarray, most: int) -> np.ndarray:
    """The experts in `most` places; -1 in those that are added."""
    width = [(0, 0)] * (experts.ndim - 1) + [(0, most - experts.shape[-1])]
    return np.pad(experts, width, constant_values=-1)
