"""Rows from every kind of file, and errors that name file and line."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.errors import DataError

RAW = [{"instruction": f"Q{i}?", "input": "", "output": f'A{i}, "é"\nand a line'} for i in range(3)]
EXPECTED = [(("user", f"Q{i}?"), ("assistant", f'A{i}, "é"\nand a line')) for i in range(3)]


def jsonl(path, records=RAW):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def write(kind, folder):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        jsonl(path)
    elif kind == "json":
        path.write_text(json.dumps(RAW), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, RAW[0])
            table.writeheader()
            table.writerows(RAW)
    else:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(RAW), path)
    return str(path)


# ---------------------------------------------------------------- kinds of sources


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file(kind, tmp_path):
    rows = load_rows(write(kind, tmp_path), domain="text")
    assert [row.messages for row in rows] == EXPECTED
    assert {row.domain for row in rows} == {"text"}
    assert [row.messages for row in load_rows(write(kind, tmp_path), domain="text", limit=2)] == EXPECTED[:2]


def test_a_folder_and_a_glob_read_files_in_order(tmp_path):
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name, "response": "A"}])
    (tmp_path / "notes.txt").write_text("ignored")
    order = [row.messages[0][1] for row in load_rows(str(tmp_path), domain="d")]
    assert order == ["a", "b", "c"]
    assert [row.messages[0][1] for row in load_rows(f"{tmp_path}/[ab].jsonl", domain="d")] == ["a", "b"]
    (tmp_path / "deep").mkdir()
    jsonl(tmp_path / "deep" / "z.jsonl", [{"prompt": "z", "response": "A"}])
    assert len(load_rows(f"{tmp_path}/**/*.jsonl", domain="d")) == 4


def test_data_of_an_installed_package():
    rows = load_rows("package:ultrafuser/zoo/data/mixed.test.jsonl", limit=3)
    assert len(rows) == 3 and {row.domain for row in rows} == {"mixed"}


def test_nested_conversations_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "domain": "code"}]), tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet"))[0].messages == (("user", "Q"), ("assistant", "A"))


def test_write_then_read(tmp_path):
    rows = [Row("1", "math", EXPECTED[0], tests="assert 1"), Row("2", "ü", EXPECTED[1], topic="t")]
    write_rows(rows, tmp_path / "out.jsonl")
    assert load_rows(str(tmp_path / "out.jsonl")) == rows
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_a_byte_order_mark_is_no_character(tmp_path):
    """Excel and some editors write one."""
    for kind in ("csv", "jsonl", "json"):
        path = write(kind, tmp_path)
        with open(path, encoding="utf-8", newline="") as stream:
            text = stream.read()
        with open(path, "w", encoding="utf-8-sig", newline="") as stream:
            stream.write(text)
        assert [row.messages for row in load_rows(path, domain="text")] == EXPECTED, kind


def test_hub_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return RAW

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/name", domain="text", split="test", revision="v1")
    assert [row.messages for row in rows] == EXPECTED
    [(args, kwargs)] = calls
    assert args[0] == "owner/name" and not any(args[1:])
    assert kwargs == {"split": "test", "revision": "v1"}


# ---------------------------------------------------------------- mistakes


def refuses(path, words, **options):
    with pytest.raises(DataError, match=words):
        load_rows(str(path), **{"domain": "text"} | options)


def test_a_malformed_row_names_file_and_line(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [RAW[0], RAW[1] | {"output": " "}, RAW[2]])
    refuses(path, r"rows\.jsonl:2: column 'output' is empty")


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(RAW[0]) + "\n{'single': 'quotes'}\n")
    refuses(tmp_path / "rows.jsonl", r"rows\.jsonl:2: not JSON: .* column 2")


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(RAW[0]) + "\n\n \t\r\n" + json.dumps(RAW[1]) + "\n\n")
    assert [row.messages for row in load_rows(str(tmp_path / "rows.jsonl"), domain="d")] == EXPECTED[:2]
    (tmp_path / "rows.csv").write_text("prompt,response\n\nQ,A\n\n")
    assert len(load_rows(str(tmp_path / "rows.csv"), domain="d")) == 1


def test_a_json_list_names_the_element(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([RAW[0], {"x": 1}]))
    refuses(tmp_path / "rows.json", r"rows\.json\[1\]: no known layout")


def test_json_that_is_no_list(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"rows": RAW}))
    refuses(tmp_path / "rows.json", r"rows\.json: no known layout in the columns \['rows'\]")
    (tmp_path / "rows.json").write_text("3")
    refuses(tmp_path / "rows.json", r"rows\.json: expected a JSON list of rows, got int")
    (tmp_path / "rows.json").write_text("[1,")
    refuses(tmp_path / "rows.json", r"rows\.json\[1\]: not JSON: .* at column 4")


def test_csv_names_the_line(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,response\nQ0,A0\n"Q1\nmore",A1\nQ2,\n')
    refuses(tmp_path / "rows.csv", r"rows\.csv:5: column 'response' is empty")


def test_parquet_names_the_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.Table.from_pylist([{"prompt": "Q", "response": r} for r in ("A", None)]), tmp_path / "rows.parquet"
    )
    refuses(tmp_path / "rows.parquet", r"rows\.parquet\[1\]: column 'response' is empty")


def test_a_broken_parquet_file(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 but no more")
    refuses(tmp_path / "rows.parquet", r"rows\.parquet: not a readable Parquet file")


def test_not_utf8(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(RAW[0]).encode() + b'\n{"prompt": "\xe9"}\n')
    refuses(tmp_path / "rows.jsonl", r"rows\.jsonl:2: not UTF-8 at byte 12 of the line. Convert the file")


def test_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    refuses(tmp_path / "rows.jsonl", r"rows\.jsonl: no rows")
    (tmp_path / "rows.csv").write_text("prompt,response\n")
    refuses(tmp_path / "rows.csv", r"rows\.csv: no rows")
    (tmp_path / "rows.json").write_text("[]")
    refuses(tmp_path / "rows.json", r"rows\.json: no rows")


def test_nothing_there(tmp_path):
    refuses(
        tmp_path / "missing.jsonl",
        r"missing\.jsonl: no such file, expected \.jsonl, \.ndjson, .*\.arrow .*, a folder",
    )
    refuses(tmp_path / "*.jsonl", r"\*\.jsonl: no such file")
    refuses("data/rows.jsonl", r"data/rows\.jsonl: no such file")


def test_a_folder_without_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refuses(tmp_path, "no file of a known type in this folder, expected")


def test_an_unknown_file_type(tmp_path):
    (tmp_path / "rows.txt").write_text("x")
    refuses(tmp_path / "rows.txt", r"rows\.txt: unknown file type '\.txt', expected one of \.jsonl")


def test_a_package_that_is_not_there():
    refuses("package:no_such_package/rows.jsonl", "the Python package 'no_such_package' is not installed")
    refuses("package:ultrafuser/no_such.jsonl", "the Python package 'ultrafuser' has no 'no_such.jsonl'")


def test_a_hub_data_set_that_is_not_there(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise FileNotFoundError("Couldn't find it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refuses(
        "owner/name",
        r"owner/name: no such local file, and the hub data set could not be loaded \(split 'train'\): Could",
    )


def test_long_cells_of_csv(tmp_path):
    long = "word " * 60_000
    (tmp_path / "rows.csv").write_text(f'prompt,response\n"{long}",A\n')
    assert load_rows(str(tmp_path / "rows.csv"), domain="text")[0].messages[0][1] == long.strip()


def test_csv_that_cannot_be_read(tmp_path, monkeypatch, request):
    from ultrafuser.data import records

    request.addfinalizer(partial(csv.field_size_limit, csv.field_size_limit()))  # of the whole process
    monkeypatch.setattr(records, "_MAX_CELL_BYTES", 10)
    (tmp_path / "rows.csv").write_text('prompt,response\n"a long question",A\n')
    refuses(tmp_path / "rows.csv", r"rows\.csv:\d: not readable CSV: field larger than field limit \(10\)")
