"""Rows in every known layout, and the location of every mistake."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ultrafuser.data.schema import Row, parse_record, parse_row
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" A. ", "A."),  # completions of some data sets begin with one space
        ("\n\nA.\n", "A."),
        ("    return x\n", "    return x"),
        ("\n  \n    if x:\n        return 1\n", "    if x:\n        return 1"),
        ("\treturn x\r\n", "\treturn x"),
        ("\r\n  - item", "  - item"),
        ("  \u3000A", "  \u3000A"),
        ("\u00a0A", "A"),
    ],
)
def test_the_indentation_of_the_first_line_survives(text, expected):
    raws = [
        {"prompt": text, "completion": text},
        {"messages": [turn(text, "user"), turn(text)]},
        {"prompt": [turn(text, "user")], "completion": [turn([{"type": "text", "text": text}])]},
    ]
    for raw in raws:
        assert parse(raw, domain="code").messages == (("user", expected), ("assistant", expected))


def test_a_null_column_does_not_hide_another_layout():
    """Tables give every column to every row, with nulls."""
    assert parse({"messages": None, "prompt": "Q?", "response": "A."}, domain="d").messages[0] == ("user", "Q?")


USER, ANSWER = TURNS


@pytest.mark.parametrize(
    ("raw", "roles", "contents"),
    [
        # ShareGPT with a system column and with tools, as LLaMA-Factory and Hermes have it
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
            "sua", ["S", "Q?", "A."],
        ),
        (
            {"conversations": [
                {"from": "human", "value": "Q?"}, {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "observation", "value": "42"}, {"from": "gpt", "value": "A."},
            ]},
            "uata", ["Q?", '{"name": "f"}', "42", "A."],
        ),
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "Human", "value": "Q?"},
                            {"from": "tool", "value": "x"}]}, None, "got system, user, tool"),
        (
            {"conversations": [
                {"from": "human", "value": "Q?"}, {"from": "tool_call", "value": '{"name": "f"}'},
                {"from": "tool_response", "value": "42"}, {"from": "chatgpt", "value": "A."},
            ]},
            "uata", ["Q?", '{"name": "f"}', "42", "A."],
        ),
        ({"messages": [turn("Q?", "prompter"), turn("A.", "bot")]}, "ua", ["Q?", "A."]),
        ({"messages": [{"role": "developer", "content": "S"}, *TURNS]}, "sua", ["S", "Q?", "A."]),
        ({"messages": [turn("", "system"), *TURNS]}, "ua", ["Q?", "A."]),
        ({"messages": [turn(None, "system"), *TURNS], "system": "S"}, "sua", ["S", "Q?", "A."]),
        ({"messages": TURNS, "system": "S"}, "sua", ["S", "Q?", "A."]),
        ({"messages": [turn("S", "system"), *TURNS], "system": "S"}, "sua", ["S", "Q?", "A."]),
        ({"messages": [turn("T", "system"), *TURNS], "system": "S"}, None, "column 'system' and the system message differ"),
        ({"messages": TURNS, "system": ["S"]}, None, "column 'system': a list of str"),
        # Alpaca with system and history
        (
            {"instruction": "Q?", "input": "more", "output": "A.", "system": "S", "history": [["Q0", "A0"], ["Q1", "A1"]]},
            "suauaua", ["S", "Q0", "A0", "Q1", "A1", "Q?\n\nmore", "A."],
        ),
        ({"instruction": "Q?", "output": "A.", "history": '[["Q0", "A0"]]'}, "uaua", ["Q0", "A0", "Q?", "A."]),
        ({"instruction": "Q?", "output": "A.", "history": [], "system": None}, "ua", ["Q?", "A."]),
        ({"instruction": "Q?", "output": "A.", "history": [["Q0"]]}, None, r"history\[0\]: expected \[question, answer\]"),
        ({"instruction": "Q?", "output": "A.", "history": "none"}, None, "'history' must be a list"),
        ({"instruction": "Q?", "output": "A.", "history": [["Q0", ""]]}, None, r"history\[0\]: empty content"),
        ({"system_prompt": "S", "question": "Q?", "response": "A."}, "sua", ["S", "Q?", "A."]),  # OpenOrca
        # context in every layout
        ({"prompt": "Q?", "input": "more", "completion": "A."}, "ua", ["Q?\n\nmore", "A."]),
        ({"question": "Q?", "context": "more", "answer": "A."}, "ua", ["Q?\n\nmore", "A."]),
        ({"instruction": "Q?", "input": 7, "output": "A."}, "ua", ["Q?\n\n7", "A."]),
        ({"instruction": "Q?", "input": {"x": 1}, "output": "A."}, None, "column 'input': expected text, got dict"),
        # TRL
        ({"prompt": [USER], "completion": [ANSWER]}, "ua", ["Q?", "A."]),
        ({"prompt": [turn("S", "system"), USER], "completion": "A."}, "sua", ["S", "Q?", "A."]),
        ({"prompt": "Q?", "completion": [ANSWER]}, "ua", ["Q?", "A."]),
        ({"prompt": [USER], "input": "more", "completion": [ANSWER]}, "ua", ["Q?\n\nmore", "A."]),
        ({"prompt": [USER], "completion": [USER]}, None, "got user, user"),
        # cells with JSON text, numbers, parts
        ({"messages": '[{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]'}, "ua", ["Q?", "A."]),
        ({"question": 6, "answer": 42}, "ua", ["6", "42"]),
        ({"question": "Q?", "answer": 0}, "ua", ["Q?", "0"]),
        ({"question": "Q?", "answer": -0.5}, "ua", ["Q?", "-0.5"]),
        ({"question": "Q?", "answer": 10**400}, "ua", ["Q?", "1" + "0" * 400]),
        ({"question": "Q?", "answer": Decimal("1.50")}, "ua", ["Q?", "1.50"]),
        ({"messages": [USER, turn(42)]}, "ua", ["Q?", "42"]),
        (
            {"messages": [turn([{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}], "user"), ANSWER]},
            "ua", ["Q?", "A."],
        ),
        ({"prompt": "Q?", "completion": [{"type": "text", "text": "A."}]}, "ua", ["Q?", "A."]),
        (
            {"messages": [turn([{"type": "image", "text": None}, {"type": "text", "text": "Q?"}], "user"), ANSWER]},
            None, r"messages\[0\]: a part of type 'image', expected text only",
        ),
        ({"messages": [turn([{"type": "text"}], "user"), ANSWER]}, None, "a part of type 'text'"),
        ({"messages": [turn(["Q?"], "user"), ANSWER]}, None, "a list of str, expected text or a list of text parts"),
        ({"messages": [], "prompt": "Q?", "response": "A."}, "ua", ["Q?", "A."]),
        ({"instruction": "Q?", "output": None, "response": "A."}, "ua", ["Q?", "A."]),
    ],
)  # fmt: skip
def test_layouts_that_people_have(raw, roles, contents):
    if roles is None:
        with pytest.raises(DataError, match=f"^{AT}: .*{contents}"):
            parse(raw, domain="d")
        return
    row = parse(raw, domain="d")
    assert "".join(role[0] for role, _ in row.messages) == roles
    assert [content for _, content in row.messages] == contents
    assert parse_row(row.to_dict(), AT) == row


def test_further_keys_of_messages_survive():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        turn("Q?", "user") | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        turn("7", "tool") | {"tool_call_id": "1", "name": "f"},
        turn("A.") | {"reasoning_content": "Hm.", "weight": 1.0},
    ]
    row = parse({"messages": messages, "domain": "d"})
    assert row.chat() == [messages[0], messages[1] | {"content": ""}, messages[2], messages[3] | {"weight": 1}]
    assert row.messages == (("user", "Q?"), ("assistant", ""), ("tool", "7"), ("assistant", "A."))
    assert parse_row(row.to_dict(), AT) == row and hash(row)
    sharegpt = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A0", "weight": 0}]
    sharegpt += [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A1", "weight": None}]
    assert [message.get("weight") for message in parse({"conversations": sharegpt}, domain="d").chat()] == [
        None, 0, None, None,
    ]  # fmt: skip


def test_only_the_completion_of_a_prompt_with_answers_is_learned():
    """As in TRL, unless the answers have weights of their own."""
    prompt = [turn("Q0", "user"), turn("A0"), turn("Q1", "user"), turn("A1") | {"weight": 1}, turn("Q2", "user")]
    row = parse({"prompt": prompt, "completion": [turn("A2")]}, domain="d")
    assert [message.get("weight") for message in row.chat() if message["role"] == "assistant"] == [0, 1, None]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"weight": 0}, "every answer has weight 0, so there is nothing to learn"),
        ({"weight": 0.5}, r"messages\[1\]: weight 0.5, expected 0 or 1"),
        ({"weight": "0"}, r"messages\[1\]: weight '0', expected 0 or 1"),
        ({"reasoning_content": ["Hm."]}, r"messages\[1\]: 'reasoning_content' must be text, got list"),
        ({"tool_calls": "f(x)"}, r"messages\[1\]: 'tool_calls' must be a list of objects, got str"),
        ({"reasoning_content": "\ud83d"}, "message 1, reasoning_content: holds a lone surrogate"),
        ({"tool_calls": [{"name": "\ud83d"}]}, "message 1, tool_calls: holds a lone surrogate"),
        ({"content": "\ud83d"}, "message 1: holds a lone surrogate, half of a character"),
    ],
)
def test_further_keys_are_checked(message, problem):
    with pytest.raises(DataError, match=problem):
        parse({"messages": [USER, ANSWER | message]}, domain="d")


def test_text_columns_take_texts_and_numbers_only():
    row = parse({"messages": TURNS, "topic": 7, "licence": None, "source": float("nan")}, domain="d")
    assert (row.topic, row.licence, row.source) == ("7", "", "")
    for column in ("source", "licence", "topic", "subtopic", "id", "check", "tests"):
        with pytest.raises(DataError, match=f"'{column}': expected text"):
            parse({"messages": TURNS, column: {"x": 1}}, domain="d")
    with pytest.raises(DataError, match="source: holds a lone surrogate"):
        parse({"messages": TURNS, "source": "\udc00"}, domain="d")


def test_a_list_of_tests_is_statements():
    """MBPP has a list."""
    row = parse({"messages": TURNS, "tests": ["assert f(1) == 1", "assert f(2) == 2"]}, domain="d")
    assert row.tests == "assert f(1) == 1\nassert f(2) == 2"
    assert parse({"messages": TURNS, "tests": []}, domain="d").tests is None
    with pytest.raises(DataError, match="'tests': expected text or a list of texts, got list"):
        parse({"messages": TURNS, "tests": [1]}, domain="d")


def test_columns_and_keys_that_are_not_used_are_named():
    raw = {"messages": [USER | {"mood": "glad"}, ANSWER | {"weight": 1}], "system": "S", "prompt": "Q?", "score": 0}
    raw |= {"empty": "", "none": None, "tools": [], "nan": float("nan")}
    assert parse_record(raw, "d").unused == {"prompt", "score", "messages[].mood"}
    raw = {"instruction": "Q", "output": "A", "history": [], "input": "x", "context": "y", "response": "B"}
    assert parse_record(raw, "d").unused == {"response"}


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
        ({"messages": TURNS}, "no domain. Add a 'domain' column, or give the source one"),
        ({"messages": TURNS, "domain": ""}, "no domain"),
        ({"messages": TURNS, "domain": 3}, "domain 3: expected text, got int"),
        ({"domain": "d", "text": "t", "n": 1}, r"no known layout in the columns \['domain', 'n', 'text'\], expected"),
        ({"domain": "d"}, "no known layout"),
        ({"domain": "d", "messages": "Q"}, "'messages' must be a list of objects with 'role' and 'content'"),
        ({"domain": "d", "messages": ["Q", "A"]}, r"messages\[0\]: must be an object with 'role' and 'content', got str"),
        ({"domain": "d", "conversations": [1]}, r"conversations\[0\]: must be an object with 'from' and 'value', got int"),
        ({"domain": "d", "messages": []}, "a conversation without messages"),
        ({"domain": "d", "messages": [{"role": "system", "content": "S"}]}, "a conversation without messages"),
        ({"domain": "d", "messages": [turn("Q", "narrator")]}, r"messages\[0\]: role 'narrator', expected one of system"),
        ({"domain": "d", "messages": [turn("Q", "tool")]}, "roles must alternate .* got tool"),
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
        ({"domain": "d", "question": "Q", "answer": True}, "column 'answer': expected text, got bool"),
        ({"domain": "d", "question": "Q", "answer": {"text": "A"}}, "column 'answer': expected text, got dict"),
        ({"domain": "d", "question": "Q", "answer": float("nan")}, "column 'answer' is empty"),
        ({"domain": "d", "question": "Q", "answer": float("inf")}, "column 'answer': expected text, got float"),
        ({"domain": "d", "question": "Q", "answer": ["A"]}, "column 'answer': a list of str, expected text or a list"),
    ],
)  # fmt: skip
def test_each_mistake_names_its_location(raw, words):
    with pytest.raises(DataError, match=f"^{AT}: .*{words}"):
        parse(raw)
