"""Batches keep to the weights, visit every chunk once an epoch, and go on where they stopped."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.config.errors import InputError
from moekit.data.batches import Batches
from moekit.data.corpus import Domain


def domain(index: int, tokens: int, weight: float = 1.0) -> Domain:
    """Tokens that tell where they come from: their domain in the thousands of 10, their place below."""
    train = (np.arange(tokens) + index * 10_000).astype(np.uint16)
    return Domain(f"d{index}", weight, train, train[:5], "", ())


weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)
seeds = st.integers(-(2**40), 2**70)


@given(weights, st.integers(1, 5), seeds)
def test_each_domain_has_its_share_of_the_rows_to_within_one(shares, batch, seed):
    domains = [domain(index, 100, weight) for index, weight in enumerate(shares)]
    batches = Batches(domains, 8, batch, seed)
    drawn = np.zeros(len(shares))
    wanted = np.array(shares) / sum(shares)
    for step in range(1, 30):
        rows = batches.next().ids
        np.add.at(drawn, (rows[:, 0] // 10_000).numpy(), 1)
        assert np.abs(drawn - wanted * step * batch).max() < 1 + 1e-9


@given(st.integers(9, 200), st.integers(1, 3), st.integers(1, 8), seeds)
def test_each_epoch_visits_every_chunk_once_from_one_offset(tokens, extra, length, seed):
    tokens = max(tokens, length + extra)
    batches = Batches([domain(0, tokens)], length, 1, seed, extra)
    for epoch in range(4):
        starts = [int(batches.next().ids[0, 0])]
        offset = starts[0] % length
        chunks = (tokens - offset - extra) // length
        starts += [int(batches.next().ids[0, 0]) for _ in range(chunks - 1)]
        assert sorted(starts) == list(range(offset, offset + chunks * length, length))
        assert batches.position()["epoch"] == [epoch]


@given(st.integers(1, 3), st.integers(1, 4))
def test_rows_are_consecutive_tokens_of_the_domain_that_is_told(extra, batch):
    batches = Batches([domain(0, 50), domain(1, 60)], 7, batch, 0, extra)
    for _ in range(10):
        rows, domains = batches.next()
        assert torch.equal(rows[:, 0] // 10_000, domains)
        assert rows.shape == (batch, 7 + extra) and rows.dtype == torch.int64
        assert (rows.diff(dim=1) == 1).all()


@given(weights, st.integers(1, 4), st.integers(0, 40), seeds)
def test_restoring_a_position_gives_the_rows_of_an_uninterrupted_run(shares, batch, steps, seed):
    domains = [domain(index, 40 + 13 * index, weight) for index, weight in enumerate(shares)]
    whole = Batches(domains, 8, batch, seed, 2)
    for _ in range(steps):
        whole.next()
    position = json.loads(json.dumps(whole.position()))
    resumed = Batches(domains, 8, batch, seed, 2)
    resumed.restore(position)
    assert resumed.position() == whole.position()
    for _ in range(10):
        assert all(map(torch.equal, resumed.next(), whole.next()))


def test_a_position_does_not_change_when_the_run_goes_on():
    batches = Batches([domain(0, 50)], 8, 2, 0)
    position = batches.position()
    before = json.dumps(position)
    batches.next()
    assert json.dumps(position) == before


def test_seeds_epochs_and_domains_have_their_own_orders():
    def starts(seed, domains, rows=48):
        batches = Batches(domains, 8, rows, seed)
        return [int(row) for row in batches.next().ids[:, 0]]

    two = [domain(0, 400), domain(1, 400)]
    assert starts(1, two) == starts(1, two) != starts(2, two)
    both = starts(1, two)
    assert [s for s in both if s < 10_000] != [s - 10_000 for s in both if s >= 10_000]
    assert starts(1, two[:1], 49) != starts(1, two[:1], 98)[49:]


def test_every_token_is_read_in_some_epoch():
    batches = Batches([domain(0, 43)], 8, 1, 0, 1)
    seen = {int(token) for _ in range(400) for token in batches.next().ids[0]}
    assert seen == set(range(43))


def test_a_domain_shorter_than_a_row_is_named():
    with pytest.raises(InputError, match="`d0` has 8 tokens; a row takes 9"):
        Batches([domain(0, 8)], 8, 1, 0)


@pytest.mark.parametrize("other", [([domain(0, 51)], 8), ([domain(0, 50)], 9), ([domain(0, 50), domain(1, 50)], 8)])
def test_a_position_of_other_data_is_refused(other):
    position = Batches([domain(0, 50)], 8, 2, 0).position()
    with pytest.raises(InputError, match="belongs to other data"):
        Batches(*other, 2, 0).restore(position)
