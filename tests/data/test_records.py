"""Files → rows: encodings, line ends, damage."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pytest

from lorchestra.data.records import read_records
from lorchestra.errors import DataError

ROWS = [
    {"prompt": "患者发热三天，如何处理？", "completion": "先查血常规。"},
    {"prompt": "fever?", "completion": "line\u2028separator"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,completion\n患者发热三天，如何处理？,先查血常规。\nfever?,"line\u2028separator"\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.jsonl", codecs.BOM_UTF8 + JSONL.encode()),
        ("a.jsonl", JSONL.replace("\n", "\r\n")),
        ("a.jsonl", "\n" + JSONL.replace("\n", "\n\n  \n")),
        ("a.jsonl", JSONL.rstrip("\n")),
        ("a.jsonl", JSONL.encode("utf-16")),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", JSONL),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.csv", CSV),
        ("a.csv", codecs.BOM_UTF8 + CSV.replace("\n", "\r\n").encode()),
        ("a.csv", CSV.replace("fever?", '"fever?"') + "\n\n"),
        ("a.csv", CSV.replace(",", ";")),
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
    ],
)
def test_every_spelling_of_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    records = list(read_records(write(tmp_path / name, content)))
    assert [dict(record.values) for record in records] == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "发热三天。\n\n \u3000\n  fever\u2028today\n"),
        ("a.txt", codecs.BOM_UTF8 + "发热三天。\r\n\r\n\r\nfever\u2028today".encode()),
        ("a.txt", "发热三天。\n\n\nfever\u2028today\n".encode("utf-16")),
        ("a.txt.gz", gzip.compress("发热三天。\n\n\nfever\u2028today\n".encode(), mtime=0)),
    ],
)
def test_a_text_file_has_one_row_a_line(tmp_path: Path, name: str, content: str | bytes) -> None:
    records = list(read_records(write(tmp_path / name, content)))
    assert [dict(record.values) for record in records] == [{"text": "发热三天。"}, {"text": "fever\u2028today"}]
    assert [record.origin for record in records] == [f"{name}:1", f"{name}:4"]


@pytest.mark.parametrize("packed", [False, True])
def test_parquet(tmp_path: Path, packed: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    if packed:
        path = write(tmp_path / "a.parquet.gz", gzip.compress(path.read_bytes()))
    records = list(read_records(path))
    assert [dict(record.values) for record in records] == ROWS
    assert records[1].origin == f"{path.name}:2"


def test_a_saved_data_set_and_a_hub_directory(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [dict(record.values) for record in read_records(tmp_path / "saved")] == ROWS
    hub = tmp_path / "hub"
    hub.mkdir()
    write(hub / "train.jsonl", JSONL)
    write(hub / "test.jsonl", JSONL.splitlines()[0])
    records = list(read_records(hub))
    assert [dict(record.values) for record in records] == ROWS, "the train split, all of it and nothing else"
    assert records[0].origin == "hub/train:1"


def test_origins_are_lines_an_editor_shows(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", "\n" + JSONL.replace("\n", "\n\n"))
    assert [record.origin for record in read_records(text)] == ["a.jsonl:2", "a.jsonl:4"]
    table = write(tmp_path / "a.csv", 'prompt,completion\n"two\nlines",b\nc,d\n')
    assert [record.origin for record in read_records(table)] == ["a.csv:2", "a.csv:4"]
    late = write(tmp_path / "b.csv", "\n\nprompt,completion\na,b\n")
    assert [record.origin for record in read_records(late)] == ["b.csv:4"]


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"prompt,completion\n{'x' * 300_000},y\n")
    assert len(next(iter(read_records(path))).values["prompt"]) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSONL + '{"prompt": "x", "compl', r"a\.jsonl:3, column .*broken JSON.*'\{\"prompt\""),
        ("a.jsonl", JSONL + "[1, 2]\n", r"a\.jsonl:3: expected one JSON object per row.*got list: \[1, 2\]"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1.*broken JSON"),
        ("a.json", '{"a": [1,}', r"a\.json:1, column .*broken JSON"),
        ("a.json", '"text"', r"a\.json: expected a list of JSON objects, got str"),
        ("a.json", "[1]", r"a\.json:1: expected one JSON object per row.*got int"),
        (
            "a.jsonl",
            JSONL.encode() + "发热\n".encode("gb18030"),
            r"a\.jsonl:3: not UTF-8 .*iconv -f ENC.*GB18030",
        ),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv:3: got 3 fields, expected 2 \(a, b\)"),
        ("a.csv", 'a,b\n1,2\n1,"2\n3\n', r"a\.csv:3: broken CSV.*closing"),
        ("a.csv", "a,a\n1,2\n", r"names 'a' twice"),
        ("a.jsonl.gz", JSONL, r"not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)[:-12], r"not a whole gzip file"),
        ("a.parquet", "text", r"a\.parquet is not a Parquet file"),
        ("a.txt", "发热\n".encode("gb18030"), r"a\.txt:1: not UTF-8 .*GB18030"),
        ("a.docx", "text", r"suffix '\.docx' is not known.*\.jsonl"),
        ("a", "text", r"'\(none\)'|\(none\)"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        list(read_records(write(tmp_path / name, content)))
