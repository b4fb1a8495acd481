"""Batches of consecutive tokens, mixed from the domains by weight, that can stop and go on at any row."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int, UInt
from torch import Tensor

from moekit.config.errors import InputError
from moekit.data.corpus import Domain

COUNTED = 2**24
"""Tokens counted at a time: numpy counts in 64 bits, four times the size of a stored token."""


class Batch(NamedTuple):
    """Rows of tokens, and the number of the domain that each comes from."""

    ids: Int[Tensor, "B W"]
    domains: Int[Tensor, " B"]


class Batches:
    """An endless order of rows, fixed by the seed.

    Each row holds `sequence_length + extra` tokens of one domain: the inputs and, shifted, their targets.
    After any number of rows each domain has had its share of them to within one row.
    """

    def __init__(self, domains: Sequence[Domain], sequence_length: int, batch: int, seed: int, extra: int = 1) -> None:
        self.batch = batch
        self._sequence_length = sequence_length
        self._readers = [
            _Reader(domain, sequence_length, extra, (seed % 2**64, index)) for index, domain in enumerate(domains)
        ]
        total = sum(domain.weight for domain in domains)
        self._shares = [domain.weight / total for domain in domains]
        self._drawn = [0] * len(domains)

    def next(self) -> Batch:
        """The next rows [batch, sequence_length + extra], and whose they are."""
        domains = [self._choose() for _ in range(self.batch)]
        rows = [self._readers[domain].next() for domain in domains]
        return Batch(torch.from_numpy(np.stack(rows).astype(np.int64)), torch.tensor(domains))

    def position(self) -> dict[str, int | list[int]]:
        """Where the next row comes from, as plain data for a checkpoint."""
        return {
            "sequence_length": self._sequence_length,
            "tokens": [reader.tokens.size for reader in self._readers],
            "drawn": list(self._drawn),
            "epoch": [reader.epoch for reader in self._readers],
            "index": [reader.index for reader in self._readers],
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on from `position`: what follows is what would have followed then."""
        here = self.position()
        for key in ("sequence_length", "tokens"):
            if position[key] != here[key]:
                raise InputError(
                    f"the saved position belongs to other data: {key} was {position[key]}, now is {here[key]}",
                    "resume with the data and the sequence length of the run",
                )
        self._drawn = list(position["drawn"])
        for reader, epoch, index in zip(self._readers, position["epoch"], position["index"], strict=True):
            reader.enter(epoch, index)

    def _choose(self) -> int:
        """Of the domains that are behind their share, the one whose next row is due first.

        That is earliest-deadline-first scheduling, which keeps each domain within one row of its share however many
        there are (Baruah et al. 1996, "Proportionate progress"); taking the one that is most behind does not.
        """
        row = sum(self._drawn) + 1
        behind = [d for d, share in enumerate(self._shares) if self._drawn[d] < share * row]
        chosen = min(behind, key=lambda d: (self._drawn[d] + 1) / self._shares[d])
        self._drawn[chosen] += 1
        return chosen


def id_shares(domains: Sequence[Domain], vocab_size: int) -> Float64[np.ndarray, " V"]:
    """The share of each token id in the training text, each domain by its weight."""
    total = sum(domain.weight for domain in domains)
    shares = np.zeros(vocab_size)
    for domain in domains:
        parts = (domain.train[start : start + COUNTED] for start in range(0, domain.train.size, COUNTED))
        counts = sum((np.bincount(part, minlength=vocab_size) for part in parts), np.zeros(vocab_size, np.int64))
        shares += domain.weight / total / max(domain.train.size, 1) * counts
    return shares


class _Reader:
    """One domain: in each epoch its chunks in a new order, cut from a new offset."""

    def __init__(self, domain: Domain, sequence_length: int, extra: int, seed: tuple[int, int]) -> None:
        if domain.train.size < sequence_length + extra:
            raise InputError(
                f"domain `{domain.name}` has {domain.train.size} tokens; a row takes {sequence_length + extra}",
                "give it more text, or lower data.sequence_length",
            )
        self.tokens: UInt[np.ndarray, " N"] = domain.train
        self._stride = sequence_length
        self._extra = extra
        self._seed = seed
        self.enter(0, 0)

    def enter(self, epoch: int, index: int) -> None:
        """Go to the chunk `index` of an epoch."""
        random = np.random.default_rng((*self._seed, epoch))
        spare = self.tokens.size - self._stride - self._extra
        self._offset = int(random.integers(min(self._stride, spare + 1)))
        self._order = random.permutation((self.tokens.size - self._offset - self._extra) // self._stride)
        self.epoch, self.index = epoch, index

    def next(self) -> UInt[np.ndarray, " W"]:
        if self.index >= len(self._order):
            self.enter(self.epoch + 1, 0)
        start = self._offset + int(self._order[self.index]) * self._stride
        self.index += 1
        return self.tokens[start : start + self._stride + self._extra]
