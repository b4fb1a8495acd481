"""A trace counts what the model's routings say; specialisation is told from chance."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.analyze.domains import DomainTrace, count_assignments, draw_sequences, trace
from moekit.analyze.experts import expert_use
from moekit.analyze.specialisation import divergence, specialisation
from moekit.config.errors import InputError
from moekit.config.model import ModelConfig
from moekit.config.moe import MoEConfig
from moekit.model.transformer import Transformer
from moekit.moe.stats import gate_mass
from moekit.report import Report, render, to_json

SHAPE = ModelConfig(
    vocab_size=50, width=16, n_layers=3, dense_width=16, moe=MoEConfig(expert_width=8, n_routed=8, top_k=2)
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SHAPE, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def texts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"low": rng.integers(0, 25, 210).astype(np.uint16), "high": rng.integers(25, 50, 95).astype(np.uint16)}


def planted(assigned: np.ndarray, labels: np.ndarray, n_experts: int) -> DomainTrace:
    """A trace with these experts [L T K], as if a model had chosen them."""
    n_domains = int(labels.max()) + 1
    counts = count_assignments(assigned, labels, n_domains, n_experts)
    names = tuple(f"domain {i}" for i in range(n_domains))
    tokens = np.bincount(labels, minlength=n_domains)
    return DomainTrace(names, tuple(range(len(assigned))), labels, assigned, tokens, counts, counts.astype(float))


def test_counts_and_gate_mass_equal_a_plain_loop_over_the_routings(model, texts):
    result = trace(model, texts, sequence_length=32)
    for index, ids in enumerate(texts.values()):
        counts, mass = np.zeros((2, 8), dtype=np.int64), np.zeros((2, 8))
        for sequence in torch.from_numpy(ids[: len(ids) // 32 * 32].astype(np.int64)).view(-1, 1, 32):
            for layer, routing in enumerate(model(sequence).routings):
                mass[layer] += gate_mass(routing).detach().numpy()
                for expert in routing.experts.flatten().tolist():
                    counts[layer, expert] += 1
        assert (result.counts[index] == counts).all()
        np.testing.assert_allclose(result.gate_mass[index], mass, rtol=1e-4)
    assert result.domains == ("low", "high") and result.layers == (1, 2)
    assert result.tokens.tolist() == [192, 64] == np.bincount(result.labels).tolist()
    assert (result.counts.sum(axis=-1) == 2 * result.tokens[:, None]).all()


def test_a_trace_takes_at_most_max_tokens_and_repeats_with_its_seed(model, texts):
    first, again, other = (trace(model, texts, 16, max_tokens=40, seed=seed) for seed in (1, 1, 2))
    assert first.tokens.tolist() == [32, 32]
    assert (first.experts == again.experts).all()
    assert (first.experts != other.experts).any()


def test_a_text_shorter_than_a_sequence_is_traced_whole(model):
    assert trace(model, {"short": np.array([1, 2, 3])}, 32).tokens.tolist() == [3]


def test_a_domain_without_tokens_is_named(model):
    with pytest.raises(InputError, match="`void`"):
        trace(model, {"void": np.array([], dtype=np.int64)}, 32)


@given(st.integers(1, 100), st.integers(1, 40), st.integers(1, 120), st.integers(0, 9))
def test_drawn_sequences_are_distinct_pieces_of_the_text(n, length, limit, seed):
    rows = draw_sequences(np.arange(n), length, limit, np.random.default_rng(seed))
    assert 0 < rows.size <= limit
    assert (np.diff(rows, axis=1) == 1).all()
    assert len(np.unique(rows)) == rows.size


def test_empty_slots_are_not_counted():
    experts = np.array([[[0, -1], [1, 2], [-1, -1]]])
    counts = count_assignments(experts, np.array([0, 1, 1]), 2, 3)
    assert counts.tolist() == [[[1, 0, 0]], [[0, 1, 1]]]


def test_domains_with_experts_of_their_own_diverge_by_log2_n_and_their_shuffle_does_not():
    labels = np.repeat(np.arange(4), 500)
    assigned = np.stack([2 * labels, 2 * labels + 1], axis=-1)[None].astype(np.int32)
    result = specialisation(planted(assigned, labels, 8))
    assert result.divergence == pytest.approx(2.0)
    assert result.pairwise[0] == pytest.approx(1 - np.eye(4))
    assert result.shuffled.mean() < 0.02
    assert result.uniform == 2 / 8
    assert result.share[1, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_uniform_routing_diverges_no_more_than_its_shuffle():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 700)
    assigned = rng.permuted(np.tile(np.arange(8), (2, 2100, 1)), axis=-1)[:, :, :2].astype(np.int32)
    result = specialisation(planted(assigned, labels, 8), permutations=50)
    assert (result.divergence < result.shuffled.max(axis=0)).all()
    assert (result.divergence > result.shuffled.min(axis=0)).all()


@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 1000))
def test_divergence_lies_between_zero_and_log2_of_the_domains_whatever_their_sizes(n_domains, n_experts, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 50, (n_domains, 2, n_experts)) + 1
    value = divergence(counts)
    assert (value >= 0).all() and (value <= np.log2(n_domains) + 1e-9).all()
    factors = rng.integers(1, 9, (n_domains, 1, 1))
    assert divergence(counts * factors) == pytest.approx(value, abs=1e-12)


def test_a_traced_model_becomes_a_page_and_its_record(model, texts):
    use = expert_use(trace(model, texts, 32))
    assert [layer.layer for layer in use.layers] == [1, 2]
    assert all(sum(layer.load) == 2 * sum(use.tokens) for layer in use.layers)
    layer = use.layers[0]
    assert layer.max_violation == pytest.approx(max(layer.load) / np.mean(layer.load) - 1)
    assert layer.dead_experts == list(layer.load).count(0)
    report = Report(title="a", experts=use)
    assert "Do some experts starve?" in render(report)
    json.dumps(to_json(report), allow_nan=False)


def test_a_dense_model_has_no_experts_to_show(texts):
    dense = Transformer(ModelConfig(vocab_size=50, width=16, n_layers=1, dense_width=16))
    use = expert_use(trace(dense, texts, 32))
    assert use.layers == ()
    assert "experts" not in render(Report(title="dense", experts=use))
