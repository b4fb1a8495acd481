"""Every file format gives its documents, and every mistake in it a place and a way out."""

import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from moekit.config.errors import InputError
from moekit.config.run import Source
from moekit.data.documents import Documents, read_documents, read_validation


def read(path: Path, column: str = "text") -> Documents:
    return read_documents(Source(path=str(path), column=column))


def skipped(documents: Documents) -> dict[str, tuple[int, str]]:
    return {skip.reason: (skip.count, Path(skip.example.split(",")[0]).name) for skip in documents.skips}


def test_three_blank_lines_separate_the_documents_of_a_txt_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n\nstill one\r\n\r\n\r\n\r\ntwo")
    assert read(tmp_path / "a.txt").texts == ["one\n\n\nstill one", "two"]


def test_other_text_files_are_one_document(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n\n\n\n\nb = 2\n")
    assert read(tmp_path / "a.py").texts == ["a = 1\n\n\n\n\nb = 2\n"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt").texts == ["hello"]


def test_a_folder_is_read_recursively_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.md", "a/z.txt", "a/.hidden/x.txt", ".git/y.txt", ".secret.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n\n{"text": "d"}\n')
    assert read(tmp_path).texts == ["a/z.txt", "b.md", "c", "d"]


def test_what_is_not_text_is_skipped_and_counted_with_an_example(tmp_path):
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty1.txt").write_text("")
    (tmp_path / "empty2.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("good\n\n\n\n\n\n\n\ngood too")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n{"text": "\\ud800"}\n{"text": "row"}\n')
    documents = read(tmp_path)
    assert documents.texts == ["good", "good too", "row"]
    assert skipped(documents) == {
        "binary file": (1, "binary.bin"),
        "empty file": (2, "empty1.txt"),
        "empty document": (2, "good.txt"),
        "not UTF-8": (1, "latin.txt"),
        "not Unicode": (1, "rows.jsonl"),
    }


def test_a_source_with_nothing_left_says_why(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"holds no text \(binary file: 1, such as .*a\.bin\)"):
        read(tmp_path / "a.bin")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"holds no text \(no files\)"):
        read(tmp_path / "none")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        read(tmp_path / "gone.txt")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        read_validation(Source(path=str(tmp_path / "a.txt"), valid=str(tmp_path / "gone.txt")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"rows\.jsonl, line 3: is not JSON"),
        ("[1]", r"rows\.jsonl, line 3: is not a JSON object"),
        ('{"title": "t", "body": "b"}', r"rows\.jsonl, line 3: has no column `text`; its columns are title, body"),
        ('{"text": 5}', r"rows\.jsonl, line 3: column `text` holds int, not text"),
        ("[" * 100_000, r"rows\.jsonl, line 3: is not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(InputError, match=message):
        read(tmp_path / "rows.jsonl")


def test_jsonl_lines_end_only_at_newlines(tmp_path):
    text = "one\u2028two\x85three"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": text}, ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path / "rows.jsonl", "body").texts == [text]


def test_parquet_gives_its_column_in_order(tmp_path):
    texts = [f"row {number}" for number in range(2500)]
    parquet.write_table(pyarrow.table({"body": texts, "id": range(2500)}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", "body").texts == texts


def test_parquet_mistakes_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["b"], "id": [1]}), path)
    with pytest.raises(InputError, match=r"rows\.parquet: has no column `text`; its columns are body, id"):
        read(path)
    with pytest.raises(InputError, match=r"rows\.parquet, row 0: column `id` holds int, not text"):
        read(path, "id")
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"rows\.parquet: is not a Parquet file"):
        read(path)


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow") as error:
        read(tmp_path / "rows.parquet")
    assert error.value.hint == 'pip install "moekit[parquet]"'
