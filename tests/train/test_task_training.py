"""Runs whose routing goes by task or by a table: who owns a row, what validation and evaluation know of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import small_model

import moekit
from moekit.cli.main import main
from moekit.config.codec import to_toml
from moekit.config.moe import MoEConfig
from moekit.config.routing import ExpertChoiceRouting, HashRouting, Routing, TaskRouting
from moekit.config.run import RunConfig, Source
from moekit.data.batches import id_shares
from moekit.data.corpus import Corpus, prepare
from moekit.train.loop import Run, validate

Tell = Callable[..., tuple[int, str, str]]
"""A command of `moekit` in this process: its status, what it said on stdout and on stderr."""


@pytest.fixture
def sources(corpus_file: Path, tmp_path: Path) -> tuple[Source, ...]:
    """Two domains whose names are not in the order of the alphabet."""
    other = tmp_path / "numbers.txt"
    documents = [" ".join(str(7 * n * m) for n in range(60)) for m in range(1, 40)]
    other.write_text("\n\n\n\n".join(documents), "utf-8")
    return Source(path=str(corpus_file), domain="words"), Source(path=str(other), domain="numbers")


@pytest.fixture
def two_tasks(small_run: RunConfig, sources: tuple[Source, ...]) -> RunConfig:
    return with_routing(small_run, TaskRouting(n_tasks=2, n_common=2), sources)


def with_routing(run: RunConfig, routing: Routing, sources: tuple[Source, ...]) -> RunConfig:
    moe = MoEConfig(expert_width=16, n_routed=8, top_k=2, routing=routing)
    model = small_model(moe=moe)
    return replace(run, model=model, data=replace(run.data, sources=sources), train=replace(run.train, steps=4))


@pytest.fixture
def tell(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tell:
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


def corpus_of(config: RunConfig, tmp_path: Path) -> Corpus:
    return prepare(config.data, config.model.vocab_size, tmp_path / "cache")


class Onlooker:
    """Stops a run after the step `last`."""

    def __init__(self, last: int) -> None:
        self.last, self.step = last, 0

    def stepped(self, row: dict[str, Any]) -> None:
        self.step = row["step"]

    def stopping(self) -> bool:
        return self.step == self.last


def test_rows_of_one_domain_leave_the_experts_of_another_as_they_were(two_tasks: RunConfig, tmp_path: Path) -> None:
    corpus = corpus_of(two_tasks, tmp_path)
    run = Run(replace(two_tasks, train=replace(two_tasks.train, batch=1)), corpus, tmp_path / "run", False)
    for seen in range(2):
        before = [layer.experts.gate_up.detach().clone() for layer in run.stepper.model.moe_layers()]
        batch = run.batches.next()
        figures = run.stepper.gradients(batch.ids, batch.domains)
        assert batch.domains.tolist() == [seen]
        own, others = (slice(2, 5), slice(5, 8)) if seen == 0 else (slice(5, 8), slice(2, 5))
        for layer, observed, weights in zip(run.stepper.model.moe_layers(), figures.observed, before, strict=True):
            assert observed.load[own].any() and not observed.load[others].any()
            assert layer.experts.gate_up.grad[own].any() and not layer.experts.gate_up.grad[others].any()
            assert torch.equal(layer.experts.gate_up, weights)
        run.stepper.weights.clear()


def test_a_run_trains_the_experts_of_every_task_and_validates_each_domain_with_its_own(
    two_tasks: RunConfig, tmp_path: Path
) -> None:
    corpus = corpus_of(two_tasks, tmp_path)
    run = Run(two_tasks, corpus, tmp_path / "run", resume=False)
    start = [layer.experts.gate_up.detach().clone() for layer in run.stepper.model.moe_layers()]
    assert run.train(Onlooker(99))
    for layer, before in zip(run.stepper.model.moe_layers(), start, strict=True):
        assert (layer.experts.gate_up != before).flatten(1).any(dim=1).all()
    model, length = moekit.load(tmp_path / "run"), two_tasks.data.sequence_length
    assert validate(model, corpus, length) == run.progress.validation
    swapped = validate(model, corpus._replace(domains=corpus.domains[::-1]), length)
    assert swapped.keys() == run.progress.validation.keys()
    assert swapped != run.progress.validation


def test_the_command_line_takes_a_text_to_be_of_the_domain_it_is_named_after(
    two_tasks: RunConfig, tmp_path: Path, tell: Tell
) -> None:
    (tmp_path / "run.toml").write_text(to_toml(two_tasks), "utf-8")
    folder = tmp_path / "run"
    assert tell("train", tmp_path / "run.toml", "--out", folder)[0] == 0

    def losses(*options: object) -> dict[str, float]:
        status, out, err = tell("eval", folder, "--stride", 16, "--json", *options)
        assert status == 0, err
        return {row["name"]: row["loss"] for row in json.loads(out)["data"]}

    found = losses()
    assert list(found) == ["words", "numbers"]
    for own, name in enumerate(found):
        text = folder / "validation" / f"{name}.txt"
        as_task = [losses("--data", f"x={text}", "--task", task)["x"] for task in (0, 1)]
        assert losses("--data", text)[name] == found[name] == as_task[own] != as_task[1 - own]

    status, out, err = tell("eval", folder, "--data", f"strange={text}")
    assert (status, out) == (2, "") and "--task N; call it words or numbers" in err
    status, out, err = tell("eval", folder, "--data", text, "--task", 2)
    assert (status, out) == (2, "") and "tasks go from 0 to 1" in err

    status, out, err = tell("generate", folder, "--prompt", "the", "--max-new-tokens", 2)
    assert (status, out) == (2, "") and "routes by task" in err
    one, two = (
        tell("generate", folder, "--ids", "5,6", "--max-new-tokens", 2, "--task", task, "--json") for task in (0, 1)
    )
    assert one[0] == two[0] == 0

    status, out, err = tell("report", folder, "--json")
    assert status == 0, err
    figures = json.loads(out)
    assert [sample["domain"] for sample in figures["samples"]] == ["words", "numbers"]
    (folder / "validation" / "words.txt").unlink()
    status, out, err = tell("report", folder)
    assert (status, out) == (2, "") and "lacks the text of a domain" in err


def test_the_number_of_tasks_must_be_that_of_the_domains(two_tasks: RunConfig, tmp_path: Path, tell: Tell) -> None:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(two_tasks), "utf-8")
    status, out, err = tell("train", path, "--out", tmp_path / "run", "--data", two_tasks.data.sources[0].path)
    assert (status, out) == (2, "")
    assert "`model.moe.routing.n_tasks`: 2 tasks, but the data has 1 domain" in err
    assert not (tmp_path / "run").exists()


def test_generation_goes_by_the_task_of_all_rows_or_of_each(two_tasks: RunConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    model = moekit.Transformer(replace(two_tasks.model, init_std=0.3), generator).eval()
    ids = torch.randint(0, 300, (1, 5), generator=generator).expand(2, -1)
    zero, one = (moekit.generate(model, ids, 12, temperature=0.0, task=task) for task in (0, 1))
    assert torch.equal(zero[0], zero[1]) and not torch.equal(zero, one)
    assert torch.equal(moekit.generate(model, ids, 12, temperature=0.0, task=[0, 1]), torch.stack([zero[0], one[0]]))
    with torch.inference_mode():
        for task, rows in enumerate((zero, one)):
            logits = model(rows[:1], tasks=torch.tensor([task])).logits
            assert torch.equal(logits[0, 4:-1].argmax(dim=-1), rows[0, 5:])
    for wrong, words in ((None, "must be told which"), (2, "is not one"), ([0, 1, 1], "3 tasks for 2 sequences")):
        with pytest.raises(moekit.InputError, match=words):
            moekit.generate(model, ids, 2, task=wrong)


def test_a_model_without_tasks_refuses_one(small_run: RunConfig) -> None:
    model = moekit.Transformer(small_run.model)
    with pytest.raises(moekit.InputError, match="does not route by task"):
        moekit.generate(model, torch.zeros(1, 2, dtype=torch.long), 1, task=0)


def test_a_balanced_table_is_filled_from_the_training_text_once_and_kept(
    small_run: RunConfig, sources: tuple[Source, ...], tmp_path: Path
) -> None:
    config = with_routing(small_run, HashRouting(table="balanced"), sources)
    corpus = corpus_of(config, tmp_path)
    whole = Run(config, corpus, tmp_path / "whole", resume=False)
    tables = [layer.router.rule.table.detach().clone() for layer in whole.stepper.model.moe_layers()]
    shares = torch.from_numpy(id_shares(corpus.domains, 300))
    for table in tables:
        assert torch.equal(table, tables[0])
        load = torch.zeros(8, dtype=torch.float64)
        for column in table.long().T:
            load.index_add_(0, column, shares)
        assert (load - 2 / 8).abs().max() <= shares.max()
    whole.train(Onlooker(99))

    Run(config, corpus, tmp_path / "broken", resume=False).train(Onlooker(2))
    resumed = Run(config, corpus, tmp_path / "broken", resume=True)
    resumed.train(Onlooker(99))
    for one, other in zip(whole.stepper.model.parameters(), resumed.stepper.model.parameters(), strict=True):
        assert torch.equal(one, other)
    loaded = moekit.load(tmp_path / "whole")
    assert all(torch.equal(layer.router.rule.table, tables[0]) for layer in loaded.moe_layers())


def test_shares_of_ids_follow_the_weights_of_the_domains(two_tasks: RunConfig, tmp_path: Path) -> None:
    words, numbers = corpus_of(two_tasks, tmp_path).domains
    shares = id_shares([words._replace(weight=3.0), numbers], 300)
    expected = [0.75 * (words.train == i).mean() + 0.25 * (numbers.train == i).mean() for i in range(300)]
    assert shares.tolist() == pytest.approx(expected)
    assert shares.sum() == pytest.approx(1)


def test_a_model_that_sees_later_tokens_is_evaluated_with_a_note_and_writes_no_samples(
    small_run: RunConfig, sources: tuple[Source, ...], tmp_path: Path, tell: Tell
) -> None:
    config = with_routing(small_run, ExpertChoiceRouting(), sources[:1])
    (tmp_path / "run.toml").write_text(to_toml(config), "utf-8")
    folder = tmp_path / "run"
    assert tell("train", tmp_path / "run.toml", "--out", folder)[0] == 0
    status, out, err = tell("eval", folder, "--json")
    assert status == 0
    assert "expert_choice routing sees later tokens" in err and "later tokens" not in out
    status, out, err = tell("report", folder, "--json")
    assert status == 0, err
    assert "no samples: expert_choice routing sees later tokens" in err
    assert json.loads(out)["samples"] == []
    status, out, err = tell("generate", folder, "--prompt", "the")
    assert (status, out) == (2, "") and "cannot generate" in err
