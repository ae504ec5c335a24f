"""Texts of test files: every string of every file type, with its location."""

from __future__ import annotations

import json

import pytest

from ultrafuser.data.tools.texts import Text, read_texts
from ultrafuser.errors import DataError

ITEM = {
    "id": 7,
    "question": "How many?",
    "targets": {"It is two": 1, "label": 0},
    "choices": [{"text": "two", "n": 2}, ["three", None]],
}
CONTENTS = [
    ("question", "How many?"),
    ("targets.<key>", "It is two"),
    ("choices[0].text", "two"),
    ("choices[1][0]", "three"),
]


def read(path, **options):
    return list(read_texts(str(path), **options))


def contents(texts):
    return [(text.field, text.text) for text in texts]


def test_jsonl_is_read_at_every_depth_and_names_the_line(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"q": "first"}) + "\n" + json.dumps(ITEM) + "\n")
    texts = read(path)
    assert texts[0] == Text(f"{path}:1", "q", "first")
    assert contents(texts[1:]) == CONTENTS and {text.location for text in texts[1:]} == {f"{path}:2"}


def test_a_json_list_names_the_element_and_an_object_is_one_item(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([ITEM, "bare text"]))
    texts = read(path)
    assert contents(texts[:-1]) == CONTENTS
    assert texts[-1] == Text(f"{path}[1]", "", "bare text")
    path.write_text(json.dumps({"data": [ITEM]}))
    texts = read(path)
    assert {text.location for text in texts} == {str(path)}
    assert contents(texts) == [(f"data[0].{field}", text) for field, text in CONTENTS]


def test_csv_and_parquet(tmp_path):
    (tmp_path / "test.csv").write_text("question,answer\nHow many?,two\n")
    assert read(tmp_path / "test.csv") == [
        Text(f"{tmp_path}/test.csv:2", "question", "How many?"),
        Text(f"{tmp_path}/test.csv:2", "answer", "two"),
    ]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"q": "How many?", "c": [{"t": "two"}]}]), tmp_path / "test.parquet")
    assert contents(read(tmp_path / "test.parquet")) == [("q", "How many?"), ("c[0].t", "two")]


def test_plain_text_is_read_by_paragraphs_or_else_by_lines(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("\nOne two\nthree.\n\n\nFour.\n")
    assert read(path) == [Text(f"{path}:2", "", "One two\nthree."), Text(f"{path}:6", "", "Four.")]
    path.write_text("One two\nthree.\n")
    assert read(path) == [Text(f"{path}:1", "", "One two"), Text(f"{path}:2", "", "three.")]
    readme = tmp_path / "README.md"
    readme.write_text("Any other file\n")
    assert read(readme) == [Text(f"{readme}:1", "", "Any other file")]


def test_a_folder_and_a_glob(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "one"}\n')
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "README.md").write_text("not a test\n")
    assert [text.text for text in read(tmp_path)] == ["one", "two"]
    assert [text.text for text in read(f"{tmp_path}/*.txt")] == ["two"]


def test_only_some_fields_are_read(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps({"id": 8}) + "\n")
    assert contents(read(path, fields=["question", "choices"])) == [CONTENTS[0], *CONTENTS[2:]]


def test_mistakes(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "x"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl: no item has the field 'prompt'. Its fields are question"):
        read(path, fields=["prompt"])
    with pytest.raises(DataError, match=r"none\.json: no such test file, expected \.jsonl, .* or plain text"):
        read(tmp_path / "none.json")
    (tmp_path / "bad.txt").write_bytes(b"\xe9")
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 0"):
        read(tmp_path / "bad.txt")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad\.json: not JSON"):
        read(tmp_path / "bad.json")
