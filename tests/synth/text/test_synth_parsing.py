"""Reading replies: every way in which models write lists, and what is no list."""

from __future__ import annotations

import json
import textwrap

import pytest

from ultrafuser.synth.text.parsing import (
    GIANT_CHARS,
    NamedConcepts,
    Unreadable,
    as_instruction,
    as_name,
    as_named_concepts,
    read_instruction,
    read_list,
    read_rating,
    read_text,
    split_tests,
)

AB = ["Name a river.", "Name a hill."]


def reason_of(read, reply):
    """Why a reply cannot be read."""
    with pytest.raises(Unreadable) as error:
        read(reply)
    return str(error.value)


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(AB),
        f"```json\n{json.dumps(AB, indent=2)}\n```",
        f"Sure! Here they are:\n\n```\n{json.dumps(AB)}\n```\nTell me if you need more.",
        f"Here is the list: {json.dumps(AB)} as you wished.",
        '["Name a river.", "Name a hill.",]',
        '["Name a river.",\n "Name a hill.", "Name a va',
        '{"instructions": ["Name a river.", "Name a hill."]}',
        '{"instructions": ["Name a river.", "Name a hill.", "cut of',
        '```json\n["Name a river.", "Name a hill."',
        "<think>\n1. hm\n</think>\n1. Name a river.\n2. Name a hill.",
        "1. Name a river.\n2. Name a hill.",
        "1) Name a river.\n\n2) Name a hill.\n",
        "Here are two:\n\n- Name a river.\n- Name a hill.",
        "* Name a river.\n* Name a hill.\n\nI hope this helps.",
        "• Name a river.\n• Name a hill.",
        "1. Name a river.\n2. Name a hill.\n\nI hope this helps!",
    ],
)
def test_lists(reply):
    items = read_list(reply)
    assert [as_instruction(item) for item in items] == AB


@pytest.mark.parametrize(
    "reply",
    [
        '[{"instruction": "Name a river."}, {"instruction": "Name a hill."}]',
        '{"instruction": "Name a river."}\n{"instruction": "Name a hill."}',
        '{"tasks": [{"id": 1, "task": "Name a river."}, {"id": 2, "task": "Name a hill.",},]}',
    ],
)
def test_lists_of_objects(reply):
    assert [as_instruction(item) for item in read_list(reply)] == AB


def test_an_item_goes_on_over_several_lines():
    reply = "1. Sort this list:\n   3, 1, 2\n2. Name a hill."
    assert read_list(reply) == ["Sort this list:\n   3, 1, 2", "Name a hill."]


@pytest.mark.parametrize(
    "reply",
    [
        "1. Sort the list [3, 1, 2].\n2. Name a hill.",
        '1. What does ["a", "b"][0] give?\n2. Name a hill.',
        '1. Mend this code:\n```python\nx = ["a", "b"\n```\n2. Name a hill.',
        "Here are two:\n- What is in {'a': 1}?\n- Name a hill.",
    ],
)
def test_brackets_and_code_in_an_item_are_part_of_it(reply):
    items = read_list(reply)
    assert len(items) == 2 and items[1] == "Name a hill."


FENCED = "```text\n1. one\n2. two\n\n- three\n```"


@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
@pytest.mark.parametrize(
    "reply",
    [
        f"1. Mend this list:\n{FENCED}\n2. Name a hill.",
        f"1. Mend this list:\n\n{FENCED}\n\n2. Name a hill.",
        f"1. Mend this list:\n{textwrap.indent(FENCED, '   ')}\n2. Name a hill.",
        f"- Mend this list:\n{textwrap.indent(FENCED, '  ')}\n- Name a hill.",
        f"- Mend this list:\n{FENCED}\n- Name a hill.",
    ],
)
def test_lists_in_the_code_of_an_item_are_part_of_it(reply, fence):
    first, second = read_list(reply.replace("```", fence))
    assert first.replace("\n\n", "\n") == f"Mend this list:\n{FENCED}".replace("```", fence).replace("\n\n", "\n")
    assert "\n\n- three" in first and second == "Name a hill."


def test_code_of_the_last_item_is_complete():
    reply = f"1. Name a hill.\n2. Mend this list:\n\n{textwrap.indent(FENCED, '   ')}\n\nI hope this helps."
    assert read_list(reply) == ["Name a hill.", f"Mend this list:\n\n{FENCED}"]


def test_a_list_inside_a_code_block_is_a_list():
    assert read_list("```\n1. Name a river.\n2. Name a hill.\n```")[:1] == ["Name a river."]
    assert len(read_list("~~~~\n- Name a river.\n- Name a hill.\n~~~~")) == 2


def test_a_fence_that_is_never_closed_does_not_swallow_the_next_items():
    assert len(read_list("1. Mend ```x```:\n```\nx = 1\n2. Name a hill.\n3. Name a lake.")) == 3


def test_json_in_long_fences_and_list_items():
    for fence in ("````", "~~~"):
        assert read_list(f"{fence}json\n{json.dumps(AB)}\n{fence}\n") == AB


def test_a_list_of_numbers_is_no_list_of_texts():
    assert reason_of(read_list, "I sorted it: [1, 2, 3].") == "no list"


def test_commas_within_texts_stay():
    assert read_list('["Is [1, 2,] a list?", "Name a hill."]') == ["Is [1, 2,] a list?", "Name a hill."]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty reply"),
        ("  \n ", "empty reply"),
        ("<think>hm</think>", "empty reply"),
        ("<think>hm, perhaps\n1. Name a river.\n2. Na", "empty reply"),  # cut off in its thoughts
        ("x" * (GIANT_CHARS + 1), "giant reply"),
        ("I would be glad to help.", "no list"),
        ('{"topics": [{"name": ', "wrong JSON"),
        ("[[[[" * 20000, "wrong JSON"),
    ],
)
def test_replies_without_a_list(reply, reason):
    assert reason_of(read_list, reply) == reason


@pytest.mark.parametrize(
    ("item", "name"),
    [
        ("Tea and coffee", "Tea and coffee"),
        ("**Tea**: all about it", "Tea"),
        ('"Tea"', "Tea"),
        ("Tea - how to make it", "Tea"),
        ("Tea.", "Tea"),
        ({"name": "Tea"}, "Tea"),
        ({"topic": "Tea: green", "concepts": []}, "Tea: green"),
        ("C++", "C++"),
    ],
)
def test_names(item, name):
    assert as_name(item) == name


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (3, "not text"),
        (None, "not text"),
        ([], "not text"),
        ({}, "not text"),
        ("", "empty item"),
        ("***", "empty item"),
        ("This is a long sentence that explains at length what one could do if one only wanted to", "not a name"),
        ("x" * 200, "not a name"),
    ],
)
def test_items_that_are_not_names(item, reason):
    assert reason_of(as_name, item) == reason


def test_sub_topics_with_concepts():
    assert as_named_concepts({"name": "Tea", "concepts": ["leaf", "leaf", "", 3, "cup"]}, 5) == NamedConcepts(
        "Tea", ("leaf", "cup")
    )
    assert as_named_concepts("Tea: leaf, cup; water.", 2) == NamedConcepts("Tea", ("leaf", "cup"))
    assert as_named_concepts("Tea", 2) == NamedConcepts("Tea")


def test_instructions_out_of_lists():
    assert as_instruction({"instruction": "Sort.", "input": "3 1"}) == "Sort.\n\n3 1"
    assert as_instruction('"Sort them."') == "Sort them."
    assert reason_of(as_instruction, 7) == "not text"
    assert reason_of(as_instruction, "?!") == "empty item"


def test_one_text():
    assert read_text("<think>x</think> An answer. ") == "An answer."
    assert read_text("hm\n</think>\nAn answer.") == "An answer."  # some templates open the thoughts in the prompt
    assert read_text("=== the assistant 12ab34cd\nAn answer.\n=== end of the assistant 12ab34cd") == "An answer."
    assert reason_of(read_text, " ") == "empty reply"
    assert read_instruction("**Rewritten instruction:** Name two rivers.") == "Name two rivers."
    assert read_instruction("New version: “Name two rivers.”") == "Name two rivers."


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good.\n[[7]]", 7),
        ("[[10]]", 10),
        ("[[7]] at first, but\n[[3]]", "no rating"),
        ("It is a 7.", "no rating"),
        ("[[0]]", "no rating"),
        ("[[11]]", "no rating"),
        ("", "empty reply"),
    ],
)
def test_ratings(reply, rating):
    assert (reason_of(read_rating, reply) if isinstance(rating, str) else read_rating(reply)) == rating


CODE = "Here:\n\n```python\ndef f():\n    return 1\n```"


def test_tests_are_cut_off_an_answer():
    assert split_tests(f"{CODE}\n\nTests:\n\n```python\nassert f() == 1\n```\n") == (CODE, "assert f() == 1")
    assert split_tests(f"{CODE}\n\n```python\nimport math\nassert f() == 1\n```") == (
        CODE,
        "import math\nassert f() == 1",
    )


@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
def test_tests_between_other_fences_are_cut_off_too(fence):
    tests = f"{fence}python\nassert f() == 1\n{fence}"
    assert split_tests(f"{CODE}\n\nTests:\n\n{tests}") == (CODE, "assert f() == 1")
    assert split_tests(f"{CODE}\n\n2. **Tests**:\n\n{textwrap.indent(tests, '   ')}\n") == (CODE, "assert f() == 1")


@pytest.mark.parametrize(
    "answer",
    [
        CODE,
        f"{CODE}\n\n```python\nprint(f())\n```",
        f"{CODE}\n\n```python\nassert f( == 1\n```",
        f"{CODE}\n\n```python\nassert f() == 1\n```\nThat is all.",
        "```python\nassert 1\n```",
        f"{CODE}\n\n```python\nimport math\n```",
    ],
)
def test_blocks_that_are_not_tests_stay_in_the_answer(answer):
    assert split_tests(answer) == (answer, None)
