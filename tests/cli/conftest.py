"""A folder with a run file and text, and the command line in this process."""

from pathlib import Path

import pytest
from cli_cases import RUN, Moekit, Said, words

from moekit.cli.main import main


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `run.toml` and `words.txt`."""
    (tmp_path / "words.txt").write_text(words(), "utf-8")
    (tmp_path / "run.toml").write_text(RUN, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def moekit(capfd: pytest.CaptureFixture[str]) -> Moekit:
    def call(*arguments: str) -> Said:
        capfd.readouterr()
        status = main(list(arguments))
        return Said(status, *capfd.readouterr())

    return call


@pytest.fixture
def trained(here: Path, moekit: Moekit) -> Path:
    """A finished run in `runs/a`."""
    assert moekit("train", "run.toml", "--out", "runs/a").status == 0
    return here / "runs" / "a"
