"""`--resume` goes on from whatever a killed run left, and refuses what is damaged."""

import json
import shutil
from pathlib import Path

import pytest
from cli_cases import Moekit, assert_refused, contents, words


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_begins_anew(trained: Path, moekit: Moekit, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    shutil.copytree(trained, killed)
    shutil.rmtree(killed / "checkpoints")
    (killed / "checkpoints" / ".step-00000002.writing").mkdir(parents=True)
    (killed / "checkpoints" / ".step-00000002.writing" / "half").write_text("x")
    (killed / "model.safetensors").unlink()
    said = moekit("train", "--resume", "--out", "killed")
    assert said.status == 0, said.err
    assert same_weights(killed, trained)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("left", [[], ["config.json", "tokenizer.json"]])
def test_a_run_killed_before_run_json_begins_anew(
    left: list[str], trained: Path, moekit: Moekit, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    for part in ("checkpoints", "validation"):
        (killed / part).mkdir(parents=True)
    for name in left:
        shutil.copy(trained / name, killed / name)
    (killed / ".run.json.writing").write_text("{")
    assert_refused(moekit("train", "--resume", "--out", "killed"), "killed holds no run.json", "run")
    said = moekit("train", "run.toml", "--resume", "--out", "killed")
    assert said.status == 0, said.err
    assert same_weights(killed, trained)


def test_a_run_without_a_folder_begins_anew(here: Path, moekit: Moekit) -> None:
    assert moekit("train", "run.toml", "--resume", "--out", "new/deep").status == 0


def test_more_steps_go_on_from_the_newest_checkpoint(trained: Path, moekit: Moekit) -> None:
    said = moekit("train", "--resume", "--out", "runs/a", "--train.steps", "6", "--json")
    assert json.loads(said.out)["step"] == 6
    assert "from step 4" in said.err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"modl": {}}', '{"model": {"width": "x"}}', "\xff", "[" * 99_999])
def test_a_damaged_run_json_is_named(content: str, trained: Path, moekit: Moekit) -> None:
    (trained / "run.json").write_text(content, "latin-1")
    before = contents(trained)
    assert_refused(moekit("train", "--resume", "--out", "runs/a"), "run.json")
    assert contents(trained) == before


FILES = ("model.safetensors", "training_state.safetensors", "training_state.json", "config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_damaged_checkpoint_is_named(name: str, keep: float, trained: Path, moekit: Moekit) -> None:
    # The run's weights are the same file as its newest checkpoint's.
    file = newest(trained) / name
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[: int(len(content) * keep)])
    before = contents(trained)
    assert_refused(moekit("train", "--resume", "--out", "runs/a", "--train.steps", "6"), "step-00000004")
    assert contents(trained) == before


def test_other_text_is_refused_before_it_replaces_anything(trained: Path, here: Path, moekit: Moekit) -> None:
    (here / "words.txt").write_text(words(5), "utf-8")
    before = contents(trained)
    assert_refused(moekit("train", "--resume", "--out", "runs/a", "--train.steps", "6"), "other data")
    assert contents(trained) == before


def test_a_training_state_that_lacks_a_part_is_named(trained: Path, moekit: Moekit) -> None:
    (newest(trained) / "training_state.json").write_text('{"step": 4}')
    assert_refused(moekit("train", "--resume", "--out", "runs/a"), "step-00000004")


def test_a_run_that_lost_its_description_is_not_taken_for_a_new_one(trained: Path, moekit: Moekit) -> None:
    (trained / "run.json").unlink()
    before = contents(trained)
    assert_refused(moekit("train", "run.toml", "--resume", "--out", "runs/a"), "runs/a holds")
    assert contents(trained) == before


def test_a_folder_of_another_name_among_the_checkpoints_is_left_alone(trained: Path, moekit: Moekit) -> None:
    (trained / "checkpoints" / "step-by-step").mkdir()
    said = moekit("train", "--resume", "--out", "runs/a", "--train.steps", "6")
    assert said.status == 0, said.err
    assert (trained / "checkpoints" / "step-by-step").is_dir()
