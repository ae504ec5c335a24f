"""Rows in every known layout, and the location of every mistake."""

from __future__ import annotations

import pytest

from ultrafuser.data.schema import Row, parse_row
from ultrafuser.errors import DataError

TURNS = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
AT = "rows.jsonl:7"


def turn(content, role="assistant"):
    return {"role": role, "content": content}


def parse(raw, **options):
    return parse_row(raw, AT, **options)


# ---------------------------------------------------------------- layouts


def test_messages():
    raw = {
        "id": "x1",
        "domain": "math",
        "messages": TURNS,
        "source": "s",
        "licence": "CC0",
        "topic": "t",
        "subtopic": "u",
    }
    row = parse(raw | {"tests": "assert True", "check": "assert answer"})
    assert row == Row(
        "x1", "math", (("user", "Q?"), ("assistant", "A.")), "s", "CC0", "t", "u", "assert True", "assert answer"
    )
    assert row.chat() == TURNS


def test_round_trip():
    row = parse({"domain": "code", "messages": [{"role": "system", "content": "S"}, *TURNS], "topic": "ü"})
    assert parse_row(row.to_dict(), AT) == row
    assert "tests" not in row.to_dict() and "check" not in row.to_dict()


def test_sharegpt_conversations():
    raw = {"conversations": [
        {"from": "system", "value": "S"}, {"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."},
    ]}  # fmt: skip
    assert parse(raw, domain="text").messages == (("system", "S"), ("user", "Q?"), ("assistant", "A."))


@pytest.mark.parametrize(
    ("raw", "question"),
    [
        ({"instruction": "Q?", "input": "", "output": "A."}, "Q?"),
        ({"instruction": "Q?", "input": "context", "output": "A."}, "Q?\n\ncontext"),
        ({"instruction": "Q?", "output": "A."}, "Q?"),
        ({"instruction": "Q?", "response": "A."}, "Q?"),
        ({"instruction": "Q?", "context": "context", "response": "A."}, "Q?\n\ncontext"),
        ({"instruction": "Q?", "context": None, "response": "A."}, "Q?"),
        ({"instruction": "Q?", "input": "context", "response": "A."}, "Q?\n\ncontext"),
        ({"prompt": "Q?", "completion": "A."}, "Q?"),
        ({"prompt": "Q?", "response": "A."}, "Q?"),
        ({"query": "Q?", "response": "A."}, "Q?"),
        ({"question": "Q?", "answer": "A."}, "Q?"),
        ({"problem": "Q?", "solution": "A.", "answer": "7"}, "Q?"),
    ],
)
def test_instruction_layouts(raw, question):
    assert parse(raw, domain="text").messages == (("user", question), ("assistant", "A."))


def test_white_space_at_the_ends_goes():
    assert parse({"prompt": " Q?\n", "response": "\n\tA. \n"}, domain="text").messages == (
        ("user", "Q?"),
        ("assistant", "A."),
    )


def test_a_null_column_does_not_hide_another_layout():
    """Tables give every column to every row, with nulls."""
    assert parse({"messages": None, "prompt": "Q?", "response": "A."}, domain="d").messages[0] == ("user", "Q?")


# ---------------------------------------------------------------- identity and domain


def test_ids():
    assert parse({"id": 17, "messages": TURNS}, domain="d").id == "17"
    assert parse({"id": 0, "messages": TURNS}, domain="d").id == "0"
    made = parse({"messages": TURNS}, domain="d").id
    assert made == parse({"messages": TURNS, "topic": "other"}, domain="e").id and len(made) == 12
    assert made != parse({"messages": [TURNS[0], {"role": "assistant", "content": "B."}]}, domain="d").id


def test_the_given_domain_wins():
    assert parse({"domain": "math", "messages": TURNS}).domain == "math"
    assert parse({"domain": "math", "messages": TURNS}, domain="mixed").domain == "mixed"


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (["not", "an", "object"], "expected a JSON object, got list"),
        ("text", "expected a JSON object, got str"),
        ({"messages": TURNS}, "no domain. Add a 'domain' column or give the source one in the recipe"),
        ({"messages": TURNS, "domain": ""}, "no domain"),
        ({"messages": TURNS, "domain": 3}, "no domain"),
        ({"domain": "d", "text": "t", "n": 1}, r"no known layout in the columns \['domain', 'n', 'text'\], expected"),
        ({"domain": "d"}, "no known layout"),
        ({"domain": "d", "messages": "Q"}, "'messages' must be a list of objects with 'role' and 'content'"),
        ({"domain": "d", "messages": ["Q", "A"]}, "'messages' must be a list of objects"),
        ({"domain": "d", "conversations": [1]}, "'conversations' must be a list of objects with 'from' and 'value'"),
        ({"domain": "d", "messages": []}, "a conversation without messages"),
        ({"domain": "d", "messages": [{"role": "system", "content": "S"}]}, "a conversation without messages"),
        ({"domain": "d", "messages": [turn("Q", "tool")]}, r"messages\[0\]: role 'tool', expected one of system"),
        ({"domain": "d", "messages": [{"content": "Q"}]}, r"messages\[0\]: role None"),
        ({"domain": "d", "messages": [TURNS[0], turn("  ")]}, r"messages\[1\]: empty content of the assistant"),
        ({"domain": "d", "messages": [TURNS[0], turn(None)]}, r"messages\[1\]: empty content"),
        ({"domain": "d", "messages": [TURNS[0], {"role": "assistant"}]}, r"messages\[1\]: empty content"),
        ({"domain": "d", "messages": TURNS[:1]}, "must alternate user, assistant and end with assistant, got user"),
        ({"domain": "d", "messages": TURNS[1:]}, "roles must alternate .* got assistant"),
        ({"domain": "d", "messages": TURNS[:1] * 2 + TURNS[1:]}, "got user, user, assistant"),
        ({"domain": "d", "messages": [*TURNS, {"role": "system", "content": "S"}]}, "got user, assistant, system"),
        ({"domain": "d", "instruction": "Q", "output": ""}, "column 'output' is empty"),
        ({"domain": "d", "instruction": " ", "output": "A"}, "column 'instruction' is empty"),
        ({"domain": "d", "question": "Q", "answer": 7}, "column 'answer' is empty"),
    ],
)  # fmt: skip
def test_each_mistake_names_its_location(raw, words):
    with pytest.raises(DataError, match=f"^{AT}: .*{words}"):
        parse(raw)
