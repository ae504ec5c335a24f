"""Files of every type, compression and folder: every row is read, or its file and line are named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from ultrafuser.data.records import read_records
from ultrafuser.data.sources import RowReader, load_rows
from ultrafuser.data.tools.validate import validate
from ultrafuser.errors import DataError

pa = pytest.importorskip("pyarrow")


def raw(index):
    return {"prompt": f"Q{index}", "response": f"A{index}", "domain": "d"}


def lines(*indices):
    return "".join(json.dumps(raw(index)) + "\n" for index in indices).encode()


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def questions(path, reader=None, **options):
    return [row.messages[0][1] for row in load_rows(str(path), reader=reader, **options)]


def refuses(path, words, **options):
    with pytest.raises(DataError, match=words):
        load_rows(str(path), **options)


# ---------------------------------------------------------------- names and compression


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.v2.Jsonl", "a.json", "A.JSON"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".GZ", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), (".xz", lzma.compress)],
)  # fmt: skip
def test_json_lines_under_every_name(name, suffix, compress, tmp_path):
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(compress(lines(0, 1, 2)))
    assert questions(file) == questions(tmp_path) == ["Q0", "Q1", "Q2"]
    assert [problem["problem"] for problem in validate([str(file)]).problems] == []


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress)])
def test_several_compressed_streams_in_one_file(suffix, compress, tmp_path):
    """As `cat a.gz b.gz` makes them."""
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(lines(0, 1)) + compress(lines(2)))
    assert questions(tmp_path) == ["Q0", "Q1", "Q2"]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_damaged_archive(suffix, tmp_path):
    compress = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    file = tmp_path / f"a.jsonl{suffix}"
    for content in (b"no archive", compress(lines(*range(50)))[:-20]):
        file.write_bytes(content)
        refuses(file, rf"a\.jsonl\{suffix}: damaged or cut off: ")
        [problem] = [p for p in validate([str(file)]).problems if p["where"] == str(file)]
        assert problem["problem"].startswith("damaged or cut off")


def test_compressed_csv_and_json(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"prompt,response\nQ0,A0\n"))
    (tmp_path / "b.json.zst").write_bytes(zstd(json.dumps([raw(1)]).encode()))
    assert questions(tmp_path, domain="d") == ["Q0", "Q1"]


def test_json_files_hold_a_list_a_record_or_lines(tmp_path):
    for text in (
        json.dumps([raw(0), raw(1)], indent=2),
        "\n\n" + lines(0, 1).decode().replace("\n", "\r\n\r\n"),
        f"{json.dumps(raw(0))}\n{json.dumps(raw(1) | {'note': chr(0x2028)}, ensure_ascii=False)}",
    ):
        (tmp_path / "a.json").write_text(text, encoding="utf-8", newline="")
        assert questions(tmp_path) == ["Q0", "Q1"]
    (tmp_path / "a.json").write_text(json.dumps(raw(0), indent=2))
    assert questions(tmp_path) == ["Q0"]
    (tmp_path / "a.json").write_bytes(lines(0) + b"{'x'}\n" + lines(2))
    refuses(tmp_path, r"a\.json:2: not JSON: .* column 2")
    assert questions(tmp_path, RowReader("skip")) == ["Q0", "Q2"]
    (tmp_path / "a.json").write_text('{"prompt": "Q",\n "response"')
    refuses(tmp_path, r"a\.json: not JSON: .* at line 2, column 12")


# ---------------------------------------------------------------- Arrow


def test_arrow_files_and_streams(tmp_path):
    table = pa.Table.from_pylist([raw(index) for index in range(5)])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert questions(tmp_path) == [f"Q{index}" for index in range(5)] * 2
    (tmp_path / "b.arrow").write_bytes(b"ARROW1 and no more")
    refuses(tmp_path, r"b\.arrow: not a readable Arrow file")
    (tmp_path / "b.arrow").write_bytes(b"")
    refuses(tmp_path / "b.arrow", r"b\.arrow: (not a readable Arrow file|no rows)")


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([raw(0), raw(1)]).save_to_disk(tmp_path / "set")
    assert questions(tmp_path / "set") == questions(tmp_path) == ["Q0", "Q1"]
    assert [location for _, location in read_records(str(tmp_path / "set"))][1] == f"{tmp_path}/set[1]"
    splits = {"train": datasets.Dataset.from_list([raw(2)]), "test": datasets.Dataset.from_list([raw(3)])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    reader = RowReader()
    assert questions(tmp_path / "splits", reader) == ["Q2"]
    assert reader.notes() == [f"files that are not read: {tmp_path}/splits/test"]
    assert questions(tmp_path / "splits", split="test") == questions(tmp_path / "splits" / "test") == ["Q3"]
    refuses(tmp_path / "splits", "splits: no split 'dev', it has test, train", split="dev")
    (tmp_path / "set" / "data-00000-of-00001.arrow").write_bytes(b"ARROW")
    refuses(tmp_path / "set", "set: not a readable saved data set")
    assert validate([str(tmp_path / "set")]).problems[0]["problem"].startswith("not a readable saved data set")


# ---------------------------------------------------------------- folders


def test_every_file_of_a_folder_is_read_or_named(tmp_path):
    """12 of 14 rows were gone without a word."""
    (tmp_path / "a.jsonl").write_bytes(lines(0, 1))
    (tmp_path / "B.JSONL").write_bytes(lines(2, 3, 4, 5))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(6, 7, 8, 9)))
    (tmp_path / "d.ndjson").write_bytes(lines(10, 11))
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "e.csv").write_text("prompt,response\nQ12,A\n")
    (tmp_path / "sub" / "f.json").write_text(json.dumps([raw(13)]))
    for name in ("README.md", "notes.txt", ".hidden.jsonl", "sub/x.parquet.gz"):
        (tmp_path / name).write_text("x")
    reader = RowReader()
    assert sorted(questions(tmp_path, reader, domain="d"), key=lambda q: int(q[1:])) == [f"Q{n}" for n in range(14)]
    [note] = reader.notes()
    names = [f"{tmp_path}/{name}" for name in (".hidden.jsonl", "README.md", "notes.txt", "sub/x.parquet.gz")]
    assert note == f"files that are not read: {', '.join(names)}"
    assert note in validate([str(tmp_path)], domain="d").notes
    assert len(questions(f"{tmp_path}/**", domain="d")) == 14  # matches folders and files


def test_a_glob_names_the_files_that_it_does_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(0))
    (tmp_path / "a.txt").write_text("x")
    reader = RowReader()
    assert questions(f"{tmp_path}/a*", reader) == ["Q0"]
    assert reader.notes() == [f"files that are not read: {tmp_path}/a.txt"]


def test_many_unread_files_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(0))
    for index in range(25):
        (tmp_path / f"p{index:02}.png").touch()
    reader = RowReader()
    questions(tmp_path, reader)
    assert reader.notes()[0].endswith("p09.png and 15 more")


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jsonl").write_bytes(lines(1))
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(0))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "up").symlink_to(tmp_path / "data")
    assert questions(tmp_path / "data") == ["Q0", "Q1"]


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    refuses(tmp_path, r"a\.jsonl: cannot be read: No such file or directory")
    assert validate([str(tmp_path)]).problems[0]["problem"] == "cannot be read: No such file or directory"


# ---------------------------------------------------------------- CSV


def skipped(path):
    """The questions of the good rows, and (line, problem) of the bad ones."""
    reader = RowReader("skip")
    good = questions(path, reader, domain="d")
    return good, [(row["where"].rpartition(":")[2], row["problem"]) for row in reader.bad_rows]


def test_a_quote_that_never_closes_costs_one_row(tmp_path):
    """It swallowed 197 of 200 rows."""
    path = tmp_path / "rows.csv"
    rows = [f"Q{index},A{index}" for index in range(200)]
    rows[2] = 'Quote me,"He said no'
    path.write_text("prompt,response\n" + "\n".join(rows) + "\n")
    refuses(path, r"rows\.csv:4: not readable CSV: a quote that opens in this row never closes", domain="d")
    good, bad = skipped(path)
    assert good == [f"Q{index}" for index in range(200) if index != 2]
    assert bad == [("4", "not readable CSV: a quote that opens in this row never closes")]
    findings = validate([str(path)], domain="d")
    assert (findings.rows, findings.bad_rows) == (200, 1)
    rows[150] = 'Q150,"A, 150"'  # a later quote ends the search
    path.write_text("prompt,response\n" + "\n".join(rows) + "\n")
    good, bad = skipped(path)
    assert len(good) == 199 and [line for line, _ in bad] == ["4"] and "text follows a closing quote" in bad[0][1]


def test_cells_that_do_not_fit_the_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response\nQ0,A0\nQ1,Yes, and no\n"Q2\nmore",A2\nQ3\nQ4,A4\n')
    good, bad = skipped(path)
    assert good == ["Q0", "Q2\nmore", "Q4"]
    assert bad == [
        (
            "3",
            "3 cells, expected 2 as in the header. The first surplus cell is ' and no'. Quote cells that hold commas",
        ),
        ("6", "1 cells, expected 2 as in the header"),
    ]


def test_a_row_that_is_not_utf8_costs_one_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,response\nQ0,é\n".encode() + b"Q1,\xe9\nQ2,A2\n")
    assert skipped(path) == (["Q0", "Q2"], [("3", "not UTF-8. Convert the file")])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(0) + b'{"prompt": "\xe9"}\n' + lines(2))
    assert skipped(path) == (["Q0", "Q2"], [("2", "not UTF-8 at byte 12 of the line. Convert the file")])


def test_a_header_that_cannot_be_used(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response,response\nQ,A,B\n")
    refuses(tmp_path, r"rows\.csv:1: two columns are named 'response', expected unique names")
    (tmp_path / "rows.csv").write_text('prompt,"response\nQ,A\n')
    refuses(tmp_path, r"rows\.csv:1: not readable CSV: a quote that opens in this row never closes")


def test_old_line_ends_of_csv(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "rows.csv").write_text(end.join(["prompt,response", "Q0,A0", "Q1,A1", ""]), newline="")
        assert questions(tmp_path, domain="d") == ["Q0", "Q1"]


# ---------------------------------------------------------------- values that break readers


DEEP = "[" * 5000 + "]" * 5000
BROKEN = {
    "surrogate": (r'{"domain":"d","prompt":"what \ud83d ?","response":"x"}', "message 0: holds a lone surrogate, half"),
    "digits": (
        '{"domain":"d","prompt":"Q","response":"x","n":' + "9" * 5000 + "}",
        "an integer has more than 4300 dig",
    ),
    "deep": ('{"domain":"d","prompt":"Q","response":"x","n":' + DEEP + "}", "nested deeper than 100 levels"),
    "nested": (
        '{"domain":"d","prompt":"Q","response":"x","n":' + "[" * 150 + "]" * 150 + "}",
        "nested deeper than 100",
    ),
    "nul": ('{"domain":"d","prompt":"Q\x00","response":"x"}', "not JSON: Invalid control character"),
    "cut": ('{"domain":"d","prompt":"Q","resp', "not JSON: "),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_value_names_its_row(kind, tmp_path):
    text, problem = BROKEN[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(0) + text.encode() + b"\n" + lines(2))
    refuses(path, rf"rows\.jsonl:2: .*{problem}")
    good, [(line, reason)] = skipped(path)
    assert good == ["Q0", "Q2"] and line == "2" and problem in reason
    path = tmp_path / "list.json"
    path.write_text(f"[{json.dumps(raw(0))},\n {text}, {json.dumps(raw(2))}]")
    refuses(path, rf"list\.json\[1\]: .*{problem}")


def test_brackets_in_texts_are_not_nesting(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(raw(0) | {"response": DEEP, "n": [[[1], {"x": []}]] * 500}))
    assert load_rows(str(tmp_path))[0].messages[1][1] == DEEP


# ---------------------------------------------------------------- what the reader reports


def test_skipped_rows_are_counted_and_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(0) + b"{}\n[]\n" + lines(3))
    refuses(path, r"rows\.jsonl:2: no known layout .*\. Fix the row, or skip bad rows with on_bad_row=skip")
    reader = RowReader("skip")
    assert questions(path, reader) == ["Q0", "Q3"] and reader.num_rows == 2
    assert reader.notes()[-1].startswith(f"skipped 2 bad rows of 4, the first one {path}:2: no known layout")
    reader.write_bad_rows(tmp_path / "run" / "bad_rows.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in listed] == [f"{path}:2", f"{path}:3"]
    assert listed[1]["problem"] == "expected a JSON object, got list"
    RowReader().write_bad_rows(tmp_path / "run" / "bad_rows.jsonl")
    assert not (tmp_path / "run" / "bad_rows.jsonl").exists()


def test_a_source_of_bad_rows_only_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"no rows, all 2 are bad, the first one .*a\.jsonl:1 no known layout"):
        load_rows(str(tmp_path), reader=RowReader("skip"))


def test_unused_columns_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps(raw(0) | {"license": "MIT", "\ud800": 1}) + "\n" + json.dumps(raw(1) | {"license": "x", "score": 0})
    )
    reader = RowReader()
    questions(tmp_path, reader)
    assert reader.notes() == [
        "columns that are not used: 'license' (2 rows, is it 'licence'?), 'score' (1 rows), '\\ud800' (1 rows)"
    ]
