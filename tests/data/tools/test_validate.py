"""Validation lists all problems of all rows, and none for a row that `parse_row` reads."""

from __future__ import annotations

import json
import re

import pytest

from ultrafuser.data.schema import parse_row
from ultrafuser.data.tools.validate import problems_of, validate
from ultrafuser.errors import DataError

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
GOOD = {"domain": "text", "messages": TURNS}
# Changes of a good record, which parse_row may refuse or accept.
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
def test_it_finds_problems_exactly_where_parse_row_fails(record, domain):
    try:
        parse_row(record, "", domain)
        accepted = True
    except DataError:
        accepted = False
    assert (not list(problems_of(record, domain))) == accepted


def test_all_problems_of_a_record_are_listed():
    record = {
        "messages": [{"role": "narrator", "content": ""}, {"role": "assistant", "content": {}}],
        "licence": ["MIT"],
        "tests": "assert (",
    }
    assert list(problems_of(record)) == [
        "messages[0]: role 'narrator', expected one of system, user, assistant, tool",
        "messages[0]: empty content of the narrator",
        "messages[1]: expected text, got dict",
        "no domain. Add a 'domain' column, or give the source one (--domain, or 'domain' in the recipe)",
        "'licence': expected text, got list",
        "'tests': not Python: '(' was never closed (<unknown>, line 1)",
    ]
    assert list(problems_of({"domain": "text", "prompt": " ", "response": None})) == [
        "column 'prompt' is empty",
        "column 'response' is empty",
    ]
    assert list(problems_of(GOOD | {"source": "\ud800"})) == ["source: holds a lone surrogate, half of a character"]


def test_every_line_is_checked(tmp_path):
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
    findings = validate([str(path)])
    assert findings.rows == 5 and findings.bad_rows == 4  # a blank line is no row
    problems = [(problem["where"].removeprefix(str(path)), problem["problem"]) for problem in findings.problems]
    assert [location for location, _ in problems] == [":2", ":4", ":5", ":6"]
    texts = [text for _, text in problems]
    assert texts[0].startswith("not JSON: ") and texts[0].endswith("at column 2")
    assert texts[1] == "not UTF-8 at byte 12 of the line. Convert the file"
    assert texts[2].startswith("no known layout in the columns ['domain'], expected 'messages'")
    assert texts[3] == f"id 'a' is also the id of {path}:1, expected unique ids"
    assert findings.domains == {"code": 1, "text": 2}
    assert findings.notes == [
        "column not used: 'license' (2 rows, is it 'licence'?)",
        "3 rows without a licence",
        "1 rows without a source",
    ]


def test_other_file_types(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {}, 3]))
    (tmp_path / "b.json").write_text("3")
    (tmp_path / "c.csv").write_text("prompt,response,domain\nQ,A,text\nQ,,\n")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "e.jsonl").write_text("")
    (tmp_path / "f.json").write_text(f'[{{}}, {{"n": {"9" * 5000}}}]')
    findings = validate([str(tmp_path)])
    problems = [
        (problem["where"].removeprefix(f"{tmp_path}/"), re.split(r", expected|\. ", problem["problem"])[0])
        for problem in findings.problems
    ]
    assert problems[:6] == [
        ("a.json[1]", "no known layout in the columns []"),
        ("a.json[1]", "no domain"),
        ("a.json[2]", "expected a JSON object, got int"),
        ("b.json", "expected a JSON list of rows, got int"),
        ("c.csv:3", "column 'response' is empty"),
        ("c.csv:3", "no domain"),
    ]
    assert problems[6][0] == "d.parquet" and problems[6][1].startswith("not a readable Parquet file")
    assert problems[7:] == [("f.json[1]", "an integer has more than 4300 digits")]


def test_clean_rows_have_no_problem():
    findings = validate(["package:ultrafuser/zoo/data/math.train.jsonl", "package:ultrafuser/zoo/data/code.test.jsonl"])
    assert not findings.problems and not findings.bad_rows and not findings.notes
    assert set(findings.domains) == {"math", "code"} and sum(findings.domains.values()) == findings.rows


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        validate([str(tmp_path / "none.jsonl")])
    (tmp_path / "empty.jsonl").write_text("")
    assert validate([str(tmp_path / "empty.jsonl")]).problems == [
        {"where": str(tmp_path / "empty.jsonl"), "problem": "no rows"}
    ]
