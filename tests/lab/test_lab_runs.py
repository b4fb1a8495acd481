"""The runs of a lab read the same text, and their figures are what a plain count finds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_cases import LAB, write_lab

from moekit.config.errors import InputError
from moekit.config.lab import read_lab
from moekit.data.corpus import Corpus, prepare
from moekit.lab.carry_out import RESULT, LabRun, finished, mark
from moekit.lab.figures import validation_load
from moekit.lab.places import Place, check_unchanged, places
from moekit.lab.summary import summarise, to_json
from moekit.train.metrics import read_metrics
from moekit.train.step import DivergedError


class Onlooker:
    """Stops a run after some steps."""

    def __init__(self, steps: int = 1000) -> None:
        self.left = steps

    def stepped(self, row: dict[str, Any]) -> None:
        self.left -= 1

    def stopping(self) -> bool:
        return self.left == 0


def prepared(folder: Path, lab: str = LAB) -> tuple[list[Place], Corpus]:
    found = read_lab(write_lab(folder, lab))
    config = found.variants[0].config
    return places(found, folder / "out"), prepare(config.data, config.model.vocab_size, folder / "cache")


def read(place: Place, corpus: Corpus) -> list[list[list[int]]]:
    """The ids that the model reads in five steps."""
    run = LabRun(place, corpus, "")
    seen: list[list[list[int]]] = []
    run.run.stepper.model.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    assert not run.train(Onlooker(5))
    return seen


def test_all_variants_read_the_same_tokens_in_the_same_order_and_each_seed_another(tmp_path: Path) -> None:
    found, corpus = prepared(tmp_path)
    plain, choice, plain_again, choice_again = (read(place, corpus) for place in found)
    assert len(plain) == 5 and len(plain[0]) == 4
    assert plain == choice and plain_again == choice_again
    assert plain != plain_again


def test_shared_weights_start_alike_in_all_variants(tmp_path: Path) -> None:
    found, corpus = prepared(tmp_path)
    plain, choice = (LabRun(place, corpus, "").run.stepper.model for place in found[:2])
    assert torch.equal(plain.embedding.weight, choice.embedding.weight)


def test_global_figures_are_of_the_load_of_all_validation_text(tmp_path: Path) -> None:
    found, corpus = prepared(tmp_path)
    place = found[1]
    run = LabRun(place, corpus, "mark")
    assert run.train(Onlooker())
    model = run.run.stepper.model.eval()
    loads = [[0] * 8, [0] * 8]
    for domain in corpus.domains:
        ids = [int(token) for token in domain.valid]
        for start in range(0, len(ids) - 15, 16):
            for layer, routing in enumerate(model(torch.tensor([ids[start : start + 16]])).routings):
                for token in routing.experts.tolist():
                    for expert in token:
                        loads[layer][expert] += 1
    assert validation_load(run.run).tolist() == loads
    found_figures = finished(place, "mark")
    assert found_figures is not None
    figures = found_figures.figures
    violations = [max(load) / (sum(load) / 8) - 1 for load in loads]
    assert figures.max_violation_global == pytest.approx(sum(violations) / 2, abs=1e-5)
    assert figures.dead_experts == sum(load.count(0) for load in loads)
    rows = read_metrics(place.folder / "metrics.jsonl")
    assert figures.experts_per_token == 3
    last = rows[-1]["validation"]
    assert figures.loss == pytest.approx((last["words"]["loss"] + last["numbers"]["loss"]) / 2)
    late = [layer["max_violation"] for row in rows[-2:] for layer in row["layers"]]
    assert figures.max_violation == pytest.approx(sum(late) / 4, abs=1e-5)


def timeless(value: Any) -> Any:
    """Without speeds."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if key != "tokens_per_s"}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def carried_out(folder: Path, stop_after: int) -> dict[str, Any]:
    """What a sweep finds when each run is stopped once after some steps."""
    folder.mkdir()
    lab = read_lab(write_lab(folder))
    found, corpus = prepared(folder)
    for place in found:
        if not LabRun(place, corpus, mark(corpus)).train(Onlooker(stop_after)):
            assert finished(place, mark(corpus)) is None
            assert LabRun(place, corpus, mark(corpus)).train(Onlooker())
    runs = [done for place in found if (done := finished(place, mark(corpus)))]
    return timeless(to_json(lab, runs, summarise(lab, runs)))


def test_runs_stopped_and_gone_on_with_find_what_undisturbed_ones_find(tmp_path: Path) -> None:
    whole, broken = carried_out(tmp_path / "a", 1000), carried_out(tmp_path / "b", 5)
    for part in (whole, broken):
        for variant in part["variants"]:
            assert [run["seed"] for run in variant["runs"]] == [3, 4]
    # The folders of the two texts are in neither.
    assert whole == broken


def test_a_variant_without_experts_has_no_figures_of_balance(tmp_path: Path) -> None:
    lab = LAB + "\n[variants.dense]\nmodel.dense_layers = [0, 1, 2]\n"
    found, corpus = prepared(tmp_path, lab)
    place = found[2]
    assert LabRun(place, corpus, "mark").train(Onlooker())
    done = finished(place, "mark")
    assert done is not None and done.figures.max_violation is done.figures.entropy is done.figures.drop_rate is None
    (result,) = summarise(read_lab(tmp_path / "lab.toml"), [done])
    assert not result.max_violation.values and "entropy" not in result.figures and result.causal


def test_a_run_of_other_settings_text_or_with_damaged_figures_is_refused(tmp_path: Path) -> None:
    found, corpus = prepared(tmp_path)
    place = found[0]
    assert LabRun(place, corpus, mark(corpus)).train(Onlooker())
    with pytest.raises(InputError, match="seed-3: that run read other text"):
        finished(place, "another")
    other, _ = prepared(tmp_path, LAB.replace("lr = 0.01", "lr = 0.02"))
    with pytest.raises(InputError, match=r"plain/seed-3: `optim.lr` was 0.01 in that run, and is 0.02 in the lab"):
        check_unchanged(other)
    (place.folder / RESULT).write_text(json.dumps({"data": mark(corpus), "figures": {"loss": 1}}))
    with pytest.raises(InputError, match="does not hold the figures of a run"):
        finished(place, mark(corpus))


def test_a_run_that_diverges_is_named(tmp_path: Path) -> None:
    found, corpus = prepared(tmp_path, LAB.replace("lr = 0.01", "lr = 1e38"))
    with pytest.raises(DivergedError, match=r"^variant choice, seed 4: step \d: "):
        LabRun(found[3], corpus, "mark").train(Onlooker())
    assert finished(found[3], "mark") is None


def test_the_mark_of_a_text_depends_on_all_of_its_tokens(tmp_path: Path) -> None:
    _, corpus = prepared(tmp_path)
    first, *rest = corpus.domains
    changed = first.train.copy()
    changed[7] += 1
    others = [
        first._replace(train=changed),
        first._replace(valid=first.valid[:-1]),
        first._replace(weight=2.0),
        first._replace(name="x"),
    ]
    marks = {mark(corpus._replace(domains=(domain, *rest))) for domain in (first, *others)}
    assert len(marks) == 5 and mark(corpus) in marks
