"""From conversations to the data set: reviews, duplicates, test data, balance; and the card that tells of it."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from fake_writer import Memory, Writer, tiny
from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.output.card import card, report
from ultrafuser.synth.output.dataset import (
    as_rows,
    balanced,
    edited,
    index_of_tests,
    without_duplicates,
    without_overlaps,
)
from ultrafuser.synth.pipeline import derive
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import FiltersRecipe
from ultrafuser.synth.stages.items import Conversation, Instruction


def row(index, domain="text", topic="t", subtopic="s", user=None, answer=None):
    messages = (
        ("user", user or f"Question number {index}, please?"),
        ("assistant", answer or f"Answer number {index}."),
    )
    return Row(f"id{index:04}", domain, messages, topic=topic, subtopic=subtopic)


def talk(id, **fields):
    return Conversation(
        id, Instruction("i" + id, "text", "t", "s", f"Ask {id}", "first"), ((f"Ask {id}", f"Say {id}"),), **fields
    )


# ---------------------------------------------------------------- reviews


def test_reviews_accept_edit_and_reject():
    edit = json.dumps([["user", "Ask better"], ["assistant", "Say better"]])
    reviews = {
        "a": SimpleNamespace(decision="accept", note=""),
        "b": SimpleNamespace(decision="edit", note=edit),
        "c": SimpleNamespace(decision="reject", note="dull"),
    }
    ledger = Ledger()
    rows = as_rows(tiny(), [talk(id, tests="assert f() == 1") for id in "dcba"], reviews, ledger)
    assert [row.id for row in rows] == ["a", "b", "d"]
    assert rows[1].messages == (("user", "Ask better"), ("assistant", "Say better"))
    assert [row.tests for row in rows] == ["assert f() == 1", None, "assert f() == 1"]  # they were for another answer
    assert ledger.entry("review", "text").rejected == {"rejected by a reader": 1}
    assert not ledger.unbalanced()


def test_an_edit_that_is_none():
    with pytest.raises(DataError, match="row id0001: the edit in the store is not a list"):
        edited(row(1), "{}}")


# ---------------------------------------------------------------- duplicates


LONG = "Tea is a drink that is made of the leaves of a bush, in hot water."


def test_the_same_instructions_and_the_same_answers():
    rows = [
        row(1, user="What is tea?"),
        row(2, user="what is TEA"),
        row(3, answer=LONG),
        row(4, "math", answer=LONG.upper()),
        row(5, answer="The answer is 4."),
        row(6, answer="The answer is 4."),
    ]
    ledger = Ledger()
    rows_kept = without_duplicates(rows, FiltersRecipe(near_duplicates=None), ledger)
    assert [row.id for row in rows_kept] == [
        "id0001",
        "id0003",
        "id0005",
        "id0006",
    ]  # many questions have the same short answer
    assert ledger.reasons() == {"same instructions": 1, "same answers": 1}
    assert not ledger.unbalanced()


def test_nearly_the_same():
    pytest.importorskip("datasketch")
    words = [f"word{n}" for n in range(60)]
    rows = [row(1, user=" ".join(words)), row(2, user=" ".join([*words, "more"])), row(3, user=" ".join(words[::-1]))]
    ledger = Ledger()
    assert [row.id for row in without_duplicates(rows, FiltersRecipe(), ledger)] == ["id0001", "id0003"]
    assert ledger.reasons() == {"near-duplicate instructions": 1}


# ---------------------------------------------------------------- test data

TEST_ITEM = "A train leaves the station at noon and travels at sixty miles an hour for three hours. How far does it go?"


def test_rows_that_touch_test_data_go(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": TEST_ITEM}) + "\n")
    index = index_of_tests(FiltersRecipe(decontaminate=[str(tmp_path / "*.jsonl")]))
    ledger = Ledger()
    rows = [row(1), row(2, user="Solve this.\n" + TEST_ITEM.upper().replace(" ", "  ")), row(3)]
    rows_kept, overlaps = without_overlaps(rows, index, ledger)
    assert [row.id for row in rows_kept] == ["id0001", "id0003"]
    assert overlaps[0]["id"] == "id0002" and "test.jsonl" in overlaps[0]["touches"][0]["test"]
    assert ledger.reasons() == {"13-gram of test data": 1}
    assert not ledger.unbalanced()


def test_without_test_files_nothing_is_compared():
    assert index_of_tests(FiltersRecipe()) is None
    assert without_overlaps([row(1)], None, Ledger()) == ([row(1)], [])


def test_a_missing_test_file():
    with pytest.raises(DataError, match="nowhere.jsonl"):
        index_of_tests(FiltersRecipe(decontaminate=["nowhere.jsonl"]))


# ---------------------------------------------------------------- balance


def test_rows_come_in_turn_from_topics_and_sub_topics():
    rows = [row(n, topic="big", subtopic=f"s{n % 2}") for n in range(40)]
    rows += [row(100 + n, topic="small") for n in range(5)]
    rows += [row(200 + n, "math") for n in range(7)]
    recipe, ledger = tiny("domains.text.counts.rows=16", "domains.math.counts.rows=20"), Ledger()
    rows_kept = balanced(rows, recipe, ledger)
    assert Counter(row.domain for row in rows_kept) == {"text": 16, "math": 7}
    assert Counter((row.topic, row.subtopic) for row in rows_kept if row.domain == "text") == {
        ("big", "s0"): 6, ("big", "s1"): 5, ("small", "s"): 5,
    }  # fmt: skip
    assert [row.id for row in rows_kept] == [row.id for row in rows if row in rows_kept]
    assert ledger.entry("balance", "text").rejected == {"more than wanted of its topic": 29}
    assert not ledger.unbalanced()


def test_without_a_limit_all_stay():
    rows, ledger = [row(n) for n in range(9)], Ledger()
    assert balanced(rows, tiny(), ledger) == rows
    assert ledger.rows() == []


# ---------------------------------------------------------------- accounts and card


def test_a_ledger_that_does_not_add_up_says_so():
    ledger = Ledger()
    ledger.request("responses", "text", 3)
    ledger.keep("responses", "text")
    ledger.reject("responses", "text", "cut off", "x" * 1000)
    assert ledger.unbalanced() == ["responses of text: asked 3, kept 1, pending 0, rejected 1"]
    ledger.mark_pending("responses", "text")
    assert not ledger.unbalanced()
    assert len(ledger.entry("responses", "text").examples["cut off"][0]) < 400


class Calls:
    """A store with nothing but sums."""

    def counts(self):
        return []

    def spent_usd(self):
        return 1.5


def test_the_card_accounts_for_every_item(tmp_path):
    (tmp_path / "test.txt").write_text(TEST_ITEM)
    recipe = tiny(
        licence="CC-BY-4.0",
        filters={"language": None, "near_duplicates": None, "decontaminate": [str(tmp_path / "test.txt")]},
    )
    prompts = Prompts()
    data = derive(recipe, prompts, Memory(Writer()))
    facts = report(recipe, prompts, data, Calls())
    text = card(recipe, facts, data.rows)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["configs"][0]["data_files"] == "data.parquet"
    assert "| text | 72 | " in text and "| math | 72 | " in text
    assert "| writer | `writer` | http://127.0.0.1:9/v1 | CC0-1.0 | meta_topics," in text
    assert "Rows by licence: CC0-1.0 144." in text
    assert "| responses | text | 72 | 72 |  |" in text
    assert "$1.50" in text and "`test.txt`" in text
    for name, digest in prompts.hashes().items():
        assert f"| {name} | `{digest[:16]}` |" in text
    assert json.loads(json.dumps(facts))["rows_by_domain"] == {"text": 72, "math": 72}


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ([], "0 rows left out for sharing words with `tests`."),
        (["13-gram"], "1 row left out for sharing words with `tests`: 13 words in a row 1."),
        (
            ["whole text", "13-gram", "whole message", "13-gram"],
            "4 rows left out for sharing words with `tests`: 13 words in a row 2, a whole short text 1, a user's whole "
            "message 1.",
        ),
    ],
)
def test_the_card_reports_overlaps_with_test_data(kinds, words):
    recipe, prompts = tiny(), Prompts()
    data = derive(recipe, prompts, Memory(Writer()))
    filters = recipe.filters.model_copy(update={"decontaminate": ["some/tests"]})
    facts = report(recipe, prompts, data, Calls()) | {
        "overlaps_with_test_data": [{"touches": [{"kind": kind}, {"kind": "13-gram"}]} for kind in kinds]
    }
    assert f"- Test data: {words}\n" in card(recipe.model_copy(update={"filters": filters}), facts, data.rows)


def test_a_card_without_test_data_says_that_in_bold():
    recipe, prompts = tiny(), Prompts()
    data = derive(recipe, prompts, Memory(Writer()))
    assert "**none was named" in card(recipe, report(recipe, prompts, data, Calls()), data.rows)
