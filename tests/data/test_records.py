"""Inputs to pieces to records: every record once, in order, whatever the cut; what is broken is named by its place."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cheapertraining.data import pieces
from cheapertraining.data.documents import Record
from cheapertraining.data.pieces import HubData, list_pieces
from cheapertraining.data.records import read_piece
from cheapertraining.errors import UserError

TEXTS = ["one", "zwei Zeilen\nin einem", "三", 'quotes " and \\ slashes', "", " x " * 40]


def read(*inputs: Path | str, **options: Any) -> list[Record]:
    return [record for piece in list_pieces([str(i) for i in inputs], **options) for record in read_piece(piece)]


def texts_of(records: list[Record]) -> list[Any]:
    assert not [record.problem for record in records if record.problem]
    return [r.value["text"] if isinstance(r.value, dict) else r.value for r in records]


def write_jsonl(file: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "id": i}, ensure_ascii=False) + "\n" for i, text in enumerate(texts))
    data = lines.encode("utf-8")
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(data[:50]) + gzip.compress(data[50:]))  # two members, as `cat a.gz b.gz` makes
    elif file.suffix == ".zst":
        file.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in (data[:50], data[50:])))
    else:
        file.write_bytes(data)
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    assert texts_of(read(write_jsonl(tmp_path / name, TEXTS))) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = list_pieces([str(tmp_path / "a.parquet")])
    assert sum(len(piece.slices) for piece in found) == 3
    records = [record for piece in found for record in read_piece(piece, columns=["text"])]
    assert [record.value for record in records] == [{"text": text} for text in TEXTS]
    assert str(records[3].place).endswith("a.parquet: row 3")


def test_a_saved_dataset(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"text": TEXTS})
    data.save_to_disk(str(tmp_path / "plain"))
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    assert texts_of(read(tmp_path / "plain")) == TEXTS
    hub = HubData(str(tmp_path / "splits"), split="test")
    assert texts_of([record for piece in list_pieces(hub=hub) for record in read_piece(piece)]) == TEXTS[:1]
    with pytest.raises(UserError, match=r"has the splits train, test.*--dataset-split"):
        read(tmp_path / "splits")


def test_a_data_set_read_as_a_stream_is_cut_by_its_files(tmp_path: Path) -> None:
    """A hub data set is a folder of such files; here it lies on disk."""
    write_jsonl(tmp_path / "train-0.jsonl", TEXTS[:3])
    write_jsonl(tmp_path / "train-1.jsonl", TEXTS[3:])
    write_jsonl(tmp_path / "test-0.jsonl", ["other"])
    found = list_pieces(hub=HubData(str(tmp_path)))
    assert len(found) == 2
    records = [record for piece in found for record in read_piece(piece)]
    assert texts_of(records) == TEXTS
    assert str(records[3].place) == f"{tmp_path}, shard 1: row 0"
    with pytest.raises(UserError, match=r"data set '.*' \(config None, split valid\): cannot be opened"):
        list_pieces(hub=HubData(str(tmp_path), split="valid"))


def test_text_files_by_file_line_and_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\n\n\nthree\nfour\n".encode())
    assert texts_of(read(file)) == ["one\r\ntwo\n\n\nthree\nfour\n"]
    assert texts_of(read(file, text_unit="line")) == ["one", "two", "", "", "three", "four"]
    assert [text for text in texts_of(read(file, text_unit="paragraph")) if text] == ["one\r\ntwo", "three\nfour"]


def test_a_folder_of_code_gives_its_text_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"b",
        "a/x.py": b"x",
        ".git/config": b"no",
        "a/.hidden": b"no",
        "z.bin": b"\0",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert texts_of(read(tmp_path)) == ["x", "b"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=30), st.integers(1, 200))
def test_a_file_cut_anywhere_gives_each_line_once_and_its_place(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], piece_bytes: int
) -> None:
    file = write_jsonl(tmp_path_factory.mktemp("cut") / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SMALLEST_PIECE", piece_bytes)
        records = read(file)
    assert texts_of(records) == texts
    assert [str(record.place) for record in records] == [f"{file}:{i + 1}" for i in range(len(texts))]


def test_pieces_depend_on_the_input_alone_and_are_bounded(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x" * 3_000_000)
    found = list_pieces([str(tmp_path / "*.txt")])
    assert [piece.bytes for piece in found] == [6_000_000, 6_000_000, 3_000_000]
    assert found == list_pieces([str(tmp_path)])


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', 2, r"broken JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2, r"invalid UTF-8 at byte 10 of the line \(0xff\)"),
        (b'\n["a"]\n', 2, r"expected one JSON object a line, found list"),
        (b"[" * 100_000 + b"\n", 1, r"broken JSON"),
    ],
)
def test_a_broken_line_is_one_problem_with_its_place(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content + b'{"text": "last"}\n')
    records = read(file)
    problems = [record for record in records if record.problem is not None]
    assert len(problems) == 1
    assert str(problems[0].place) == f"{file}:{line}"
    assert re.search(message, problems[0].problem or "")
    assert records[-1].value == {"text": "last"}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_file_gives_what_is_readable_and_a_problem(tmp_path: Path, name: str) -> None:
    file = write_jsonl(tmp_path / name, [f"text {i} " + "abcdefg"[i % 7] * (i % 50) for i in range(5000)])
    file.write_bytes(file.read_bytes()[:-40])
    records = read(file)
    assert records[-1].problem is not None
    assert "truncated or damaged" in records[-1].problem
    assert all(record.problem is None for record in records[:-1])


def test_what_is_not_there_or_not_readable(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "folder").mkdir()
    for given_inputs, message in [
        ([str(tmp_path / "none*.jsonl")], r"expected a file, a folder with files or a glob, found nothing"),
        ([str(tmp_path / "folder")], r"found nothing there"),
        ([str(tmp_path / "empty.jsonl")], r"all input files are empty"),
        ([str(tmp_path / "bad.parquet")], r"bad.parquet: no readable parquet file"),
        ([], r"no input"),
    ]:
        with pytest.raises(UserError, match=message):
            list_pieces(given_inputs)
    with pytest.raises(UserError, match=r"found 'jsnol'\. Did you mean 'jsonl'"):
        list_pieces([str(tmp_path / "empty.jsonl")], format="jsnol")
