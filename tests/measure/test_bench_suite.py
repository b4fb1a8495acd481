"""Every work runs, with every peer, and says what it measured."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli.bench_text import COLUMNS, lines, markdown, number, table, write
from moekit.measure.bench.names import ALL, KINDS
from moekit.measure.bench.setting import QUICK, Setting
from moekit.measure.bench.shapes import quick_sizes
from moekit.measure.bench.suite import WORKS, Result, bench, measured

pytest.importorskip("llama_cpp")

PEERED = {
    "layer-train": "transformers", "model-train": "transformers", "experts-train": "transformers",
    "layer-prefill": "transformers", "model-prefill-int4": "llama.cpp", "layer-decode": "transformers",
    "model-decode-int4": "llama.cpp", "experts-decode": "transformers", "generate-start-int4": "llama.cpp",
}  # fmt: skip
"""Works that a peer does, too."""

BOUNDED = ("GFLOP/s", "GB/s")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(said: list[str]) -> Result:
    return bench(ALL, ("transformers", "llama.cpp"), quick=True, say=said.append)


def work_of(row: str) -> str:
    """The longest name of a work that the row's name begins with."""
    return max((name for name in ALL if row.startswith(name)), key=len)


def test_every_name_has_a_work() -> None:
    assert set(WORKS) == set(ALL)


def test_every_work_has_rows_of_its_kind(result: Result, said: list[str]) -> None:
    assert {work_of(row.work) for row in result.rows} == set(ALL)
    assert len({row.work for row in result.rows}) == len(result.rows)
    for row in result.rows:
        assert work_of(row.work) in KINDS[row.kind]
    assert [text.split()[-1] for text in said if text.startswith("measuring ")][1:] == list(ALL)


def test_figures_are_above_zero_and_ratios_are_theirs(result: Result) -> None:
    for row in result.rows:
        if row.work != "layer-train-routing":
            assert row.moekit > 0
        for ratio, other in ((row.to_peer, row.peer), (row.to_limit, row.limit)):
            assert ratio == (None if other is None else row.moekit / other.value)


def test_peers_take_part_where_they_can(result: Result) -> None:
    for row in result.rows:
        program = PEERED.get(work_of(row.work))
        assert {peer.name.split()[0] for peer in row.peers} == ({program} if program else set())


def test_rates_stand_beside_the_machines_limit(result: Result) -> None:
    for row in result.rows:
        if row.unit in BOUNDED:
            assert row.limit is not None
            assert ("memory read" if row.unit == "GB/s" else "dense product") in row.limit.name


def test_training_a_model_tells_the_memory_of_whole_processes(result: Result) -> None:
    (memory,) = (row for row in result.rows if row.work == "model-train-memory")
    for value in (memory.moekit, *(peer.value for peer in memory.peers)):
        assert 0.1 < value < 4.0


def test_numbers_of_experts_are_held_against_the_fastest(result: Result) -> None:
    for kind in ("train", "decode"):
        shares = [row.details["to_fastest"] for row in result.rows if work_of(row.work) == f"experts-{kind}"]
        assert min(shares) == 1.0
        assert len(shares) > 1


def test_scripts_read_rows_and_the_machine(result: Result) -> None:
    found = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert len(found["rows"]) == len(result.rows)
    assert {"date", "cpu", "flags", "threads", "cores", "memory_bytes", "kernels", "versions", "limits"} == set(
        found["host"]
    )
    assert {"moekit", "python", "torch", "transformers", "llama-cpp-python"} <= found["host"]["versions"].keys()
    assert min(found["host"]["limits"].values()) > 0


def test_readers_get_a_line_for_each_row_and_one_for_the_machine(result: Result) -> None:
    columns, rows = table(result)
    assert columns == COLUMNS
    assert [cells[0] for cells in rows] == [row.work for row in result.rows]
    assert {len(cells) for cells in rows} == {len(COLUMNS)}
    assert len(list(lines(result))) == len(result.rows) + 1


def test_a_saved_page_names_machine_programs_figures_and_what_is_missing(result: Result, tmp_path: Path) -> None:
    page = write(tmp_path / "deep" / "er", result, ("llama.cpp",), {"rows": []})
    assert page.name.startswith(result.host.date)
    assert json.loads(page.with_name(f"{page.stem}.json").read_text("utf-8")) == {"rows": []}
    text = page.read_text("utf-8")
    assert text == markdown(result, ("llama.cpp",))
    for word in (result.host.cpu, "pip install llama-cpp-python gguf", f"torch {result.host.versions['torch']}"):
        assert word in text
    assert all(f"| {row.work} |" in text for row in result.rows)


def test_a_reader_is_told_of_unsteady_timings(result: Result) -> None:
    row = result.rows[0]._replace(spread={"moekit": 0.05, "memory read": 0.5})
    told = next(lines(result._replace(rows=(row,))))
    assert "memory read was unsteady (50%)" in told
    assert "moekit was" not in told


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (99.96, "100"), (0.01234, "0.0123"), (7.0, "7")])
def test_numbers_have_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("work", ["model-decode-int4", "generate-start-int4"])
def test_what_moekit_does_is_measured_where_a_peer_fails(work: str, tmp_path: Path) -> None:
    (tmp_path / "random.gguf").write_bytes(b"no model")
    said: list[str] = []
    setting = Setting(quick_sizes(), QUICK, frozenset(["llama.cpp"]), tmp_path, said.append)
    (row,) = measured(work, setting)
    assert row.moekit > 0
    assert row.peers == ()
    assert any("a peer failed (" in text and "llama.cpp cannot open" in text for text in said)


def test_a_bench_that_is_told_to_end_clears_its_folder_away(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moekit", "bench", "--quick", "generate-start-int4"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "measuring generate-start-int4" in line)
        assert list(tmp_path.glob("moekit-bench-*"))
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("moekit-bench-*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_ends_as_told_where_python_drops_the_exit() -> None:
    class Told:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text == "measuring layer-prefill":
            Told()

    with pytest.raises(SystemExit) as ended:
        bench(["layer-prefill", "layer-decode"], (), quick=True, say=say)
    assert ended.value.code == 128 + signal.SIGTERM
    assert said[-1] == "measuring layer-prefill"
