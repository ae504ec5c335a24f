"""Decontamination equals a slow search word by word, even with bad hashes, and reports the dropped rows."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.data.tools import decontaminate as module
from ultrafuser.data.tools.decontaminate import ContaminationIndex, Rule, decontaminate
from ultrafuser.data.tools.ngrams import window_hashes, words
from ultrafuser.data.tools.texts import Text
from ultrafuser.errors import DataError

LONG = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four."
)  # 24 words
WHOLE = "What happens to you if you eat watermelon seeds?"  # 9 words
SHORT = "Are all ravens black?"  # 4 words
CLEAN = "A text that has nothing to do with any of the tests, although it is quite long enough to share something."


def row(name, question, answer="Yes.", domain="text", system=None):
    messages = [("system", system)] if system else []
    return Row(name, domain, (*messages, ("user", question), ("assistant", answer)), source="s", licence="CC0-1.0")


def texts(*contents):
    return [Text(f"t.jsonl:{line}", "question", content) for line, content in enumerate(contents, 1)]


def matched(index, *rows):
    return {row.id: [(match.test, match.kind) for match in matches] for row, matches in index.find_matches(rows)}


# ---------------------------------------------------------------- the rule


def test_thirteen_consecutive_words_match_and_twelve_do_not():
    index = ContaminationIndex(texts(LONG))
    long_words = words(LONG)
    thirteen = row("a", "Tell me: " + " ".join(long_words[3:16]) + ", please?")
    twelve = row("b", "Tell me: " + " ".join(long_words[3:15]) + ", please?")
    answer = row("c", "Tell me.", "It begins so: " + " ".join(long_words[-13:]))
    assert matched(index, thirteen, twelve, answer) == {
        "a": [("t.jsonl:1", "13-gram")],
        "b": [],
        "c": [("t.jsonl:1", "13-gram")],
    }


def test_case_punctuation_and_white_space_do_not_matter():
    index = ContaminationIndex(texts(LONG))
    for disguise in (str.upper, lambda t: t.replace(" ", "\n\n"), lambda t: t.replace(" ", " -- "), str.title):
        assert matched(index, row("a", disguise(LONG)))["a"]


def test_signs_and_marks_between_the_words_count():
    hindi = "मैं हर दिन सुबह अपने गाँव के पुराने स्कूल तक पैदल चलकर पढ़ने जाता हूँ"  # 14 words
    formula = "Compute the value of 17 + 4 where all numbers are written in base ten please"  # 15 words
    smile = "Name a feeling that is close to what this picture 😀 shows to all of us"
    index = ContaminationIndex(texts(hindi, formula, smile))
    assert index.counts == {"ngram": 3}
    for other in (
        hindi.replace("पुराने", "पुरानी"),
        formula.replace("+", "-"),
        formula.replace("17", "1.7"),
        smile.replace("😀", "😡"),
        " ".join(hindi.split()[:8]),  # more than 13 letters and marks apart
    ):
        assert matched(index, row("a", other)) == {"a": []}, other
    assert matched(index, row("a", f"({hindi})"), row("b", f"Q: -{formula} = ?"), row("c", f"😡 {smile} 😡")) == {
        "a": [("t.jsonl:1", "13-gram")],
        "b": [("t.jsonl:2", "13-gram")],
        "c": [("t.jsonl:3", "13-gram")],
    }
    [(_, [match])] = index.find_matches([row("b", formula)])
    assert match.words == "compute the value of 17 + 4 where all numbers are written in base"


def test_a_whole_message_has_the_same_signs():
    index = ContaminationIndex(texts("What is 5!", "Is C++ old?"))
    rows = [row("a", "WHAT is\n5!"), row("b", "What is 5?"), row("c", "is c++ OLD"), row("d", "Is C old?")]
    assert {name: bool(tests) for name, tests in matched(index, *rows).items()} == {
        "a": True,
        "b": False,
        "c": True,
        "d": False,
    }


def test_a_shorter_test_text_counts_as_a_whole():
    index = ContaminationIndex(texts(WHOLE, SHORT, "B"))
    matches = matched(
        index,
        row("whole", f"Question: {WHOLE} Options follow."),
        row("part", WHOLE.removesuffix(" seeds?")),
        row("message", "are all ravens BLACK"),
        row("within", f"Tell me: {SHORT}"),
        row("answered", "Say something true.", SHORT),
        row("letter", "B", "B"),
    )
    assert matches == {
        "whole": [("t.jsonl:1", "whole text")],
        "part": [],
        "message": [("t.jsonl:2", "whole message")],
        "within": [],
        "answered": [],
        "letter": [],
    }
    assert index.counts == {"whole": 1, "message": 1, "ignored": 1}


def test_words_are_found_across_the_messages_of_a_row_but_not_across_rows():
    index = ContaminationIndex(texts(LONG))
    long_words = words(LONG)
    first, second = " ".join(long_words[:12]), " ".join(long_words[12:])
    assert matched(index, row("a", first, second))["a"]
    apart = matched(index, row("b", "So:", first), row("c", second))
    assert apart == {"b": [], "c": []}
    assert matched(index, row("d", "Hello", system=LONG))["d"]


def test_every_test_text_that_shares_the_words_is_named():
    index = ContaminationIndex([*texts(LONG, CLEAN, LONG), Text("other.json[3]", "a.b", f"Well, {LONG}")])
    [(_, matches)] = index.find_matches([row("a", LONG)])
    assert [(match.test, match.field) for match in matches] == [
        ("t.jsonl:1", "question"),
        ("t.jsonl:3", "question"),
        ("other.json[3]", "a.b"),
    ]
    assert all(match.words == " ".join(words(LONG)[:13]) for match in matches)


def slow_search(index_texts, rule, rows):
    """For each row, the locations of the matching texts."""

    def grams(words, size):
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}

    results = []
    for row in rows:
        row_words = [word for _, content in row.messages for word in words(content)]
        user_messages = [words(content) for role, content in row.messages if role == "user"]
        hits = set()
        for text in index_texts:
            text_words = words(text.text)
            size = min(rule.ngram, len(text_words))
            if len(text_words) >= rule.min_words:
                if grams(text_words, size) & grams(row_words, size):
                    hits.add(text.location)
            elif len(text_words) >= 3 and text_words in user_messages:
                hits.add(text.location)
        results.append(hits)
    return results


@pytest.mark.parametrize("bits", [64, 3])
@pytest.mark.parametrize("rule", [Rule(5, 3), Rule(4, 4), Rule(7, 5)], ids=str)
def test_it_equals_the_slow_search_even_with_bad_hashes(monkeypatch, bits, rule):
    if bits < 64:  # nearly everything collides

        def colliding(codes, size):
            return window_hashes(codes, size) & np.uint64(((1 << bits) - 1) << (64 - bits))

        monkeypatch.setattr(module, "window_hashes", colliding)
        monkeypatch.setattr(module, "_MAX_TEXTS_PER_RUN", 10**6)
    rng = random.Random(1)

    def sentence(low, high):
        return " ".join(rng.choice("abcdef") for _ in range(rng.randint(low, high)))

    tests = texts(*(sentence(1, 9) for _ in range(40)))
    rows = [row(str(n), sentence(1, 12), sentence(1, 12)) for n in range(1203)]
    index = ContaminationIndex(tests, rule)
    results = [{match.test for match in matches} for _, matches in index.find_matches(rows)]
    expected = slow_search(tests, rule, rows)
    assert results == expected
    assert any(expected) and not all(expected)


def test_boilerplate_in_many_tests_is_still_found():
    index = ContaminationIndex(texts(*[LONG] * 200))
    [(_, matches)] = index.find_matches([row("a", LONG)])
    assert len(matches) == module._MAX_TEXTS_PER_RUN


# ---------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path):
    rows = [
        row("c1", CLEAN),
        row("l1", LONG, domain="math"),
        row("c2", CLEAN, domain="math"),
        row("m1", SHORT),
        row("c3", "Hi"),
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": LONG, "answer": "4"}) + "\n")
    (tmp_path / "truthfulqa.json").write_text(json.dumps([{"question": SHORT, "targets": {WHOLE: 0}}]))
    return tmp_path


def test_clean_rows_are_copied_and_the_report_names_the_items(folder):
    tests = [str(folder / "gsm8k.jsonl"), str(folder / "truthfulqa.json")]
    file = folder / "report.json"
    report = decontaminate([str(folder / "rows.jsonl")], tests, folder / "clean.jsonl", report=file)
    clean = load_rows(str(folder / "clean.jsonl"))
    assert [row.id for row in clean] == ["c1", "c2", "c3"]
    assert clean == [row for row in load_rows(str(folder / "rows.jsonl")) if row.id.startswith("c")]
    assert (report.rows, report.kept, report.dropped) == (5, 3, 2)
    assert report.dropped_by_domain == {"math": 1, "text": 1}
    assert report.dropped_by_test == {str(folder / "gsm8k.jsonl"): 1, str(folder / "truthfulqa.json"): 1}
    assert report.test_texts == {"ngram": 1, "whole": 1, "message": 1, "ignored": 1}
    first, second = report.dropped_rows
    shared = " ".join(words(LONG)[:13])
    match = {"test": f"{folder}/gsm8k.jsonl:1", "field": "question", "kind": "13-gram", "words": shared}
    assert first == {"id": "l1", "domain": "math", "source": "s", "test_texts": 1, "touches": [match]}
    assert second["touches"][0]["test"] == f"{folder}/truthfulqa.json[0]"
    assert json.loads(file.read_text()) == asdict(report)


def test_without_an_output_it_only_reports(folder):
    files = sorted(folder.iterdir())
    report = decontaminate([str(folder / "rows.jsonl")], [str(folder / "gsm8k.jsonl")], None)
    assert report.dropped == 1 and sorted(folder.iterdir()) == files


def test_only_some_fields_are_read(folder):
    report = decontaminate([str(folder / "rows.jsonl")], [str(folder / "truthfulqa.json")], None, fields=["targets"])
    assert report.dropped == 0


def test_nothing_is_written_when_a_row_is_broken(folder):
    with (folder / "rows.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:6: no known layout"):
        decontaminate([str(folder / "rows.jsonl")], [str(folder / "gsm8k.jsonl")], folder / "clean.jsonl")
    assert not [file for file in folder.iterdir() if "clean" in file.name]


def test_mistakes(folder):
    rows, tests = [str(folder / "rows.jsonl")], [str(folder / "gsm8k.jsonl")]
    with pytest.raises(DataError, match="rows.jsonl: exists. Replace it with --force"):
        decontaminate(rows, tests, folder / "rows.jsonl")
    with pytest.raises(DataError, match="unknown file type '.txt'"):
        decontaminate(rows, tests, folder / "clean.txt")
    with pytest.raises(DataError, match="hold no text of 3 words or more"):
        decontaminate(rows, tests, None, fields=["answer"])
    with pytest.raises(DataError, match="expected 3 <= min_words <= ngram"):
        Rule(13, 14)
    with pytest.raises(DataError, match="expected 3 <= min_words <= ngram"):
        Rule(13, 2)


def test_it_may_replace_its_input(folder):
    rows = folder / "rows.jsonl"
    decontaminate([str(rows)], [str(folder / "gsm8k.jsonl")], rows, force=True)
    assert len(load_rows(str(rows))) == 4


SHARED = Path(__file__).parents[3] / "../shared/data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_the_shared_training_rows_share_no_thirteen_words_with_the_shared_tests():
    """As the README of the shared data says, although its words may be split differently."""
    report = decontaminate([str(SHARED / "train" / "math.jsonl")], [str(SHARED / "eval")], None)
    long = [row for row in report.dropped_rows if any(match["kind"] == "13-gram" for match in row["touches"])]
    assert len(long) <= 0.01 * report.rows
