"""Validation: all problems of all rows, and none where `parse_row` is content."""

from __future__ import annotations

import json

import pytest

from ultrafuser.data.schema import parse_row
from ultrafuser.data.tools.validate import problems_of, validate
from ultrafuser.errors import DataError

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
GOOD = {"domain": "text", "messages": TURNS}
# Records that parse_row refuses, or not: each a change of a good one.
RECORDS = [
    GOOD,
    {"domain": "text", "prompt": "Q", "response": "A", "extra": 1},
    {"domain": "text", "instruction": "Q", "input": None, "output": "A"},
    {"domain": "text", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"domain": "text", "conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"domain": "text", "messages": None, "question": "Q", "answer": "A"},
    GOOD | {"messages": [{"role": "system", "content": "S"}, *TURNS, *TURNS]},
    GOOD | {"domain": ""},
    GOOD | {"domain": 3},
    {"messages": TURNS},
    GOOD | {"messages": []},
    GOOD | {"messages": "Q"},
    GOOD | {"messages": ["Q", "A"]},
    GOOD | {"messages": [{"role": "system", "content": "S"}]},
    GOOD | {"messages": TURNS[:1]},
    GOOD | {"messages": TURNS[::-1]},
    GOOD | {"messages": [TURNS[0], {"role": "tool", "content": "A"}]},
    GOOD | {"messages": [TURNS[0], {"role": "assistant", "content": "  "}]},
    GOOD | {"messages": [TURNS[0], {"role": "assistant"}]},
    {"domain": "text", "prompt": "", "response": "A"},
    {"domain": "text", "prompt": "Q", "response": 7},
    {"domain": "text", "text": "Q"},
    {"domain": "text"},
    ["Q", "A"],
    None,
    "text",
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: json.dumps(record)[:60])
@pytest.mark.parametrize("domain", [None, "math"])
def test_it_finds_fault_exactly_where_parse_row_does(record, domain):
    try:
        parse_row(record, "", domain)
        accepted = True
    except DataError:
        accepted = False
    assert (not list(problems_of(record, domain))) == accepted


def test_all_problems_of_a_record_are_told():
    record = {
        "messages": [{"role": "tool", "content": ""}, {"role": "assistant", "content": None}],
        "licence": 3,
        "tests": "assert (",
    }
    assert list(problems_of(record)) == [
        "messages[0]: role 'tool', expected one of system, user, assistant",
        "messages[0]: empty content",
        "messages[1]: the content is NoneType, expected text",
        "no domain; add a 'domain' column or give one for all rows with --domain",
        "'licence': expected text, got int",
        "'tests': not Python: '(' was never closed (<unknown>, line 1)",
    ]
    assert list(problems_of({"domain": "text", "prompt": " ", "response": None})) == [
        "column 'prompt' is empty",
        "column 'response': expected text, got NoneType",
    ]
    assert list(problems_of(GOOD | {"source": "\ud800"})) == ["'source': holds half a character (a lone surrogate)"]


def test_every_line_is_looked_at(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD | {"id": "a", "source": "s", "license": "MIT"}).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"{'x': 1}",
        b"",
        b'{"prompt": "\xe9"}',
        json.dumps({"domain": "code"}).encode(),
        good,
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = validate([str(path)])
    assert found.rows == 6 and found.bad_rows == 5
    told = [(one["where"].removeprefix(str(path)), one["problem"]) for one in found.problems]
    assert [where for where, _ in told] == [":2", ":3", ":4", ":5", ":6"]
    problems = [problem for _, problem in told]
    assert problems[0].startswith("not JSON: ") and problems[0].endswith("at column 2")
    assert problems[1:3] == ["empty line; expected one JSON object", "not UTF-8 at byte 12 of the line"]
    assert problems[3].startswith("no known layout in the columns ['domain']; expected 'messages'")
    assert problems[4] == f"id 'a' is that of {path}:1 too; ids must differ"
    assert found.domains == {"code": 1, "text": 2}
    assert found.notes == [
        "column 'license' of 2 rows is not read; is it 'licence'?",
        "3 rows without a licence",
        "1 rows without a source",
    ]


def test_other_kinds_of_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {}, 3]))
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.csv").write_text("prompt,response,domain\nQ,A,text\nQ,,\n")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "e.jsonl").write_text("")
    found = validate([str(tmp_path)])
    told = [(one["where"].removeprefix(f"{tmp_path}/"), one["problem"].split(";")[0]) for one in found.problems]
    assert told[:6] == [
        ("a.json[1]", "no known layout in the columns []"),
        ("a.json[1]", "no domain"),
        ("a.json[2]", "expected a JSON object, got int"),
        ("b.json", "expected a JSON list of rows, got dict"),
        ("c.csv:3", "column 'response' is empty"),
        ("c.csv:3", "no domain"),
    ]
    assert told[6][0] == "d.parquet" and told[6][1].startswith("not a readable Parquet file")
    assert len(told) == 7


def test_clean_rows_have_no_problem():
    found = validate(["package:ultrafuser/zoo/data/math.train.jsonl", "package:ultrafuser/zoo/data/code.test.jsonl"])
    assert not found.problems and not found.bad_rows and not found.notes
    assert set(found.domains) == {"math", "code"} and sum(found.domains.values()) == found.rows


def test_nothing_there_and_nothing_in_it(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        validate([str(tmp_path / "none.jsonl")])
    (tmp_path / "empty.jsonl").write_text("")
    assert validate([str(tmp_path / "empty.jsonl")]).problems == [
        {"where": str(tmp_path / "empty.jsonl"), "problem": "no rows"}
    ]
