"""Written rows read back exactly in every layout and file type, and a file appears only when it is complete."""

from __future__ import annotations

import json

import pytest

from ultrafuser.data.files import atomic_file, write_json
from ultrafuser.data.records import read_records
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.data.tools.streaming import convert
from ultrafuser.data.writing import LAYOUTS, PAIRS, SUFFIXES, check_layout, row_writer
from ultrafuser.errors import DataError

PAIR = Row("1", "math", (("user", 'Q, "é"\n\nmore'), ("assistant", "A\nB")), "s", "CC0", "t", "u", check="answer == 1")
CODE = Row("2", "code", (("user", "数?"), ("assistant", "x = 1")), tests="assert x")
TALK = Row("3", "ü", (("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")))


def write(rows, path, layout=None, **options):
    with row_writer(path, layout, **options) as put:
        for row in rows:
            put(row)
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_file_type_reads_back(suffix, layout, tmp_path):
    if suffix == ".csv" and layout not in PAIRS:
        with pytest.raises(DataError, match="has lists, which CSV cannot hold. Use instruction/input/output or JSONL"):
            write([PAIR], tmp_path / f"out{suffix}", layout)
        return
    rows = [PAIR, CODE] if layout in PAIRS else [PAIR, CODE, TALK]
    path = write(rows, tmp_path / f"out{suffix}", layout)
    assert load_rows(path) == rows
    columns = set(next(read_records(path))[0])
    assert columns >= (set(filter(None, PAIRS[layout])) if layout in PAIRS else {layout})


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_further_keys_of_messages_read_back(suffix, layout, tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": [1, "é"]}}}
    extras = {1: {"weight": 0, "tool_calls": [call]}, 2: {"tool_call_id": "1"}, 3: {"reasoning_content": "Hm."}}
    messages = (("user", "Q"), ("assistant", ""), ("tool", "7"), ("assistant", "A"))
    rows = [PAIR, Row("tools", "d", messages, extras=extras), TALK]
    path = write(rows, tmp_path / f"out{suffix}", layout)
    assert load_rows(path) == rows
    assert [file.name for file in tmp_path.iterdir()] == [f"out{suffix}"]


def test_further_keys_of_messages_do_not_fit_a_pair(tmp_path):
    weighted = Row("w", "d", PAIR.messages, extras={1: {"weight": 1, "reasoning_content": "Hm."}})
    with pytest.raises(DataError, match="row 'w': messages with reasoning_content, weight do not fit the layout"):
        write([weighted], tmp_path / "out.csv")


def test_a_list_of_tests_is_written_as_statements(tmp_path):
    raw = {"prompt": "Q", "response": "A", "domain": "code", "tests": ["assert 1", "assert 2"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(raw))
    for suffix in SUFFIXES:
        convert([str(tmp_path / "in.jsonl")], tmp_path / f"out{suffix}")
        assert load_rows(str(tmp_path / f"out{suffix}"))[0].tests == "assert 1\nassert 2"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_many_rows_and_none(suffix, tmp_path):
    rows = [Row(str(n), "text", (("user", f"Q{n}"), ("assistant", f"A{n}"))) for n in range(4321)]
    assert load_rows(write(rows, tmp_path / f"many{suffix}")) == rows
    empty = write([], tmp_path / f"empty{suffix}")
    assert list(read_records(empty)) == []


def test_jsonl_is_what_write_rows_writes(tmp_path):
    write([TALK, TALK], tmp_path / "a.jsonl")
    write_rows([TALK, TALK], tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_datasets_loads_a_file_in_which_a_column_comes_late(suffix, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    late = Row("x", "code", PAIR.messages, tests="assert x", check="answer == 1")
    rows = [Row(str(n), "math", PAIR.messages) for n in range(99)] + [late]
    path = write(rows, tmp_path / f"rows{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"rows{suffix}"]
    small = {"chunksize": 4096} if suffix == ".jsonl" else {}
    kind = {".jsonl": "json", ".json": "json"}.get(suffix, suffix[1:])
    loaded = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=str(tmp_path / "cache"), **small)
    assert len(loaded) == 100 and not loaded[0]["tests"] and loaded[99]["tests"] == "assert x"
    assert load_rows(path) == rows


def test_columns_that_no_row_has_are_left_out(tmp_path):
    write([TALK], tmp_path / "a.jsonl")
    assert not {"tests", "check"} & set(json.loads((tmp_path / "a.jsonl").read_text()))


def test_a_talk_does_not_fit_one_question_and_one_answer(tmp_path):
    words = "row '3': messages of system, user, assistant, user, assistant do not fit the layout 'prompt/response'"
    with pytest.raises(DataError, match=words):
        write([PAIR, TALK], tmp_path / "out.jsonl", "prompt/response")
    assert list(tmp_path.iterdir()) == []


def test_a_lone_surrogate_is_an_error_that_names_the_row(tmp_path):
    broken = Row("x", "text", (("user", "\ud800"), ("assistant", "A")))
    with pytest.raises(DataError, match="row 'x': holds a lone surrogate"):
        write([broken], tmp_path / "out.jsonl")


# ---------------------------------------------------------------- atomic files


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), row_writer(path, force=True) as put:
        put(PAIR)
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write([PAIR], path, force=True)
    assert load_rows(str(path)) == [PAIR] and list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_not_replaced_without_force(tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    with pytest.raises(DataError, match=r"out\.jsonl: exists. Replace it with --force"):
        write([PAIR], tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="is a folder, expected a file name"):
        write_json(tmp_path, {}, force=True)


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"out\.jsonl: could not be written: .*. Nothing was changed"):
        write([PAIR], tmp_path / "file" / "out.jsonl")


def test_an_error_of_another_file_is_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), atomic_file(tmp_path / "out"):
        (tmp_path / "gone").read_text()


def test_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "out.json", {"é": 1})
    assert json.loads((tmp_path / "a" / "b" / "out.json").read_text(encoding="utf-8")) == {"é": 1}


def test_unknown_types_and_layouts(tmp_path):
    with pytest.raises(DataError, match=r"unknown file type '\.txt', expected one of \.jsonl, \.json"):
        check_layout(tmp_path / "out.txt", None)
    with pytest.raises(DataError, match="layout 'alpaca': expected one of messages, conversations, instruction/input"):
        check_layout(tmp_path / "out.jsonl", "alpaca")
    assert check_layout(tmp_path / "out.csv", None) == "instruction/input/output"


# ---------------------------------------------------------------- convert


def test_convert_reads_one_layout_and_writes_another(tmp_path):
    (tmp_path / "in.csv").write_text("prompt,completion,licence\nQ1,A1,MIT\nQ2,A2,\n")
    count = convert([str(tmp_path / "in.csv")], tmp_path / "out.parquet", "conversations", domain="text")
    assert count == 2
    first, second = load_rows(str(tmp_path / "out.parquet"))
    assert (first.messages, first.licence, first.domain) == ((("user", "Q1"), ("assistant", "A1")), "MIT", "text")
    assert convert([str(tmp_path / "out.parquet")], tmp_path / "one.jsonl", limit=1) == 1
    assert load_rows(str(tmp_path / "one.jsonl")) == [first]
    both = [str(tmp_path / "one.jsonl"), str(tmp_path / "out.parquet")]
    assert convert(both, tmp_path / "all.json") == 3
    assert load_rows(str(tmp_path / "all.json")) == [first, first, second]
