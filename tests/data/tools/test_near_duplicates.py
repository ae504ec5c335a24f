"""Duplicates: exact by words, near by true similarity. The first row by id is kept, whatever the order of the rows."""

from __future__ import annotations

import json
import os
import random
import sys

import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, deduplicate, find_clusters, find_groups
from ultrafuser.data.tools.ngrams import words
from ultrafuser.errors import DataError, MissingExtraError

EXACT = NearDuplicateRule(threshold=None)


def row(name, question, answer="An answer.", domain="text"):
    return Row(name, domain, (("user", question), ("assistant", answer)))


@pytest.fixture
def datasketch():
    if not os.environ.get("CI"):
        pytest.importorskip("datasketch")


def by_id(clusters, rows):
    """{kept: (exact, near)} by ids."""
    return {
        rows[cluster.kept].id: ([rows[n].id for n in cluster.exact], [rows[n].id for n, _ in cluster.near])
        for cluster in clusters
    }


def jaccard(first, second, size=3):
    def shingles(row):
        row_words = [word for _, content in row.messages for word in words(content)]
        length = min(size, len(row_words))
        return {tuple(row_words[i : i + length]) for i in range(len(row_words) - length + 1)}

    a, b = shingles(first), shingles(second)
    return len(a & b) / len(a | b)


def variants(count=120, seed=0):
    """Texts, many of them slight changes of another, in random order."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        text = [f"w{rng.randrange(2000)}" for _ in range(rng.randint(5, 60))]
        rows.append(row(f"{n:03}-a", " ".join(text)))
        for k in range(rng.randint(0, 3)):
            changed = list(text)
            for _ in range(k):
                changed[rng.randrange(len(changed))] = f"v{rng.randrange(2000)}"
            rows.append(row(f"{n:03}-{'bcd'[k]}", " ".join(changed).upper() + "!"))
    rng.shuffle(rows)
    return rows


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("rule", [EXACT, NearDuplicateRule(0.7)])
def test_another_sign_is_another_question(rule):
    rows = [row("a", "What is 5 + 3?"), row("b", "What is 5 - 3?"), row("c", "What is C++?"), row("d", "What is C#?")]
    assert len(find_clusters(rows, rule)) == 4


@pytest.mark.parametrize("rule", [EXACT, NearDuplicateRule(0.7)])
@pytest.mark.parametrize(
    "questions",
    [
        ["मैं स्कूल जाता हूँ।", "मैं स्कूल जाती हूँ।", "मैं स्कूल जाते हैं।"],
        ["ป่าอยู่ไหน", "ป้าอยู่ไหน", "ปาอยู่ไหน"],
        ["What is 5!", "What is 5?", "What is 5%"],
        ["Round 1.5", "Round 1,5", "Round 15"],
        ["How does 😀 feel?", "How does 😡 feel?", "How does it feel?"],
    ],
)
def test_marks_signs_and_emoji_make_other_questions(rule, questions, datasketch):
    rows = [row(str(index), question) for index, question in enumerate(questions)]
    rule = NearDuplicateRule(rule.threshold, "instructions")
    assert len(find_clusters(rows, rule)) == 3


def test_exact_duplicates_differ_in_case_punctuation_and_space_at_most():
    rows = [row("c", "What is 1,000 + 1?"), row("a", "what is 1000  +  1"), row("b", "What is 1,000 + 2?")]
    assert by_id(find_clusters(rows, EXACT), rows) == {"a": (["c"], []), "b": ([], [])}


def test_texts_without_words_are_compared_as_they_are():
    rows = [row("a", "!!!"), row("b", "???"), row("c", "!!!")]
    assert by_id(find_clusters(rows, EXACT), rows) == {"a": (["c"], []), "b": ([], [])}


def test_only_the_chosen_roles_are_compared():
    rows = [row("a", "Q1", "A1"), row("b", "Q1", "A2"), row("c", "Q2", "A2")]
    assert set(by_id(find_clusters(rows, EXACT), rows)) == {"a", "b", "c"}
    assert set(by_id(find_clusters(rows, NearDuplicateRule(None, "instructions")), rows)) == {"a", "c"}
    assert set(by_id(find_clusters(rows, NearDuplicateRule(None, "answers")), rows)) == {"a", "b"}


def test_messages_are_compared_one_by_one():
    rows = [row("a", "one two", "three"), row("b", "one", "two three")]
    assert set(by_id(find_clusters(rows, EXACT), rows)) == {"a", "b"}


# ---------------------------------------------------------------- near


def test_near_duplicates_are_dropped_for_the_first_by_id(datasketch):
    text = "Write a short story about a lighthouse keeper who finds a message in a bottle on a cold morning in May"
    rows = [
        row("z", text),
        row("b", text.replace("May", "June")),
        row("m", text.replace("lighthouse", "harbour").replace("bottle", "box").replace("cold", "warm")),
        row("a", "Something else entirely, about mathematics and its history."),
        row("y", text.upper()),
    ]
    clusters = by_id(find_clusters(rows, NearDuplicateRule(0.7)), rows)
    assert clusters == {"a": ([], []), "b": ([], ["y", "z"]), "m": ([], [])}


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_similarities_are_true_and_no_two_kept_rows_are_similar(datasketch, threshold):
    rows = variants()
    clusters = find_clusters(rows, NearDuplicateRule(threshold))
    for cluster in clusters:
        for index, similarity in cluster.near:
            assert similarity >= threshold
            assert similarity == pytest.approx(jaccard(rows[cluster.kept], rows[index]), abs=1e-9)
    assert sorted(
        n for cluster in clusters for n in [cluster.kept, *cluster.exact, *(n for n, _ in cluster.near)]
    ) == list(range(len(rows)))
    kept_rows = [rows[cluster.kept] for cluster in clusters]
    missed = sum(jaccard(a, b) >= threshold for i, a in enumerate(kept_rows) for b in kept_rows[:i])
    num_near = sum(len(cluster.near) for cluster in clusters)
    assert num_near > 20 and missed <= 0.05 * num_near


def test_the_order_of_the_rows_does_not_matter(datasketch):
    rows = variants()
    shuffled = random.Random(1).sample(rows, len(rows))
    rule = NearDuplicateRule(0.6)
    assert by_id(find_clusters(rows, rule), rows) == by_id(find_clusters(shuffled, rule), shuffled)

    def groups(rows):
        return {frozenset(rows[n].id for n in group) for group in find_groups(rows, rule)}

    assert groups(rows) == groups(shuffled)


def test_no_row_is_dropped_for_a_dropped_row_but_chains_stay_in_one_group(datasketch):
    text = [f"w{n}" for n in range(40)]
    rows = [row(str(k), " ".join(f"v{n}" if n < 4 * k else word for n, word in enumerate(text))) for k in range(4)]
    assert min(jaccard(a, b) for a, b in zip(rows, rows[1:], strict=False)) >= 0.7 > jaccard(rows[0], rows[2])
    rule = NearDuplicateRule(0.7)
    assert by_id(find_clusters(rows, rule), rows) == {"0": ([], ["1"]), "2": ([], ["3"])}
    assert find_groups(rows, rule) == [[0, 1, 2, 3]]


def test_rows_without_words_have_no_near_duplicates(datasketch):
    rows = [Row(str(n), "text", (("user", mark), ("assistant", mark))) for n, mark in enumerate(("!", "?", "!"))]
    assert by_id(find_clusters(rows, NearDuplicateRule()), rows) == {"0": (["2"], []), "1": ([], [])}


def test_short_texts_are_one_shingle(datasketch):
    rows = [
        Row("a", "t", (("user", "Hello"), ("assistant", "Hi"))),
        Row("b", "t", (("user", "Hello, hi!"), ("assistant", "..."))),
        Row("c", "t", (("user", "Bye"), ("assistant", "Hi"))),
    ]
    assert by_id(find_clusters(rows, NearDuplicateRule()), rows) == {"a": ([], ["b"]), "c": ([], [])}


@pytest.mark.parametrize("threshold", [0.1, 0.95, 1.0])
def test_every_allowed_threshold_works(datasketch, threshold):
    rows = [row("a", "one two three four five"), row("b", "one two three four, five!"), row("c", "six seven eight")]
    clusters = by_id(find_clusters(rows, NearDuplicateRule(threshold)), rows)
    assert clusters["a"][0] == ["b"]


# ---------------------------------------------------------------- the command


def test_the_kept_rows_keep_their_order_and_the_report_names_clusters(datasketch, tmp_path):
    text = "Explain in a few sentences how a steam engine turns heat into motion, and name two of its early uses"
    rows = [row("d", "Other"), row("c", text), row("a", text), row("b", text + " please")]
    write_rows(rows, tmp_path / "rows.jsonl")
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    summary = deduplicate([str(tmp_path / "rows.jsonl")], out, rule=NearDuplicateRule(0.75), report=report)
    assert [row.id for row in load_rows(str(out))] == ["d", "a"]
    assert (summary["rows"], summary["kept"], summary["exact_duplicates"], summary["near_duplicates"]) == (4, 2, 1, 1)
    [cluster] = summary["clusters"]
    assert (cluster["kept"], cluster["exact"], cluster["near"][0]["id"]) == ("a", ["c"], "b")
    assert 0.75 <= cluster["near"][0]["similarity"] < 1
    assert json.loads(report.read_text()) == summary


def test_exact_duplicates_alone_need_no_datasketch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    write_rows([row("a", "Q"), row("b", "Q")], tmp_path / "rows.jsonl")
    summary = deduplicate([str(tmp_path / "rows.jsonl")], None, rule=EXACT)
    assert summary["exact_duplicates"] == 1
    with pytest.raises(MissingExtraError, match=r'near duplicates needs .datasketch.*"ultrafuser\[data\]"'):
        deduplicate([str(tmp_path / "rows.jsonl")], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_mistakes(tmp_path):
    with pytest.raises(DataError, match="compare on 'topics': expected one of conversation, instructions, answers"):
        NearDuplicateRule(on="topics")
    with pytest.raises(DataError, match=r"a similarity of 1\.5: expected 0\.1 to 1"):
        NearDuplicateRule(1.5)
    write_rows([row("a", "Q")], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="exists"):
        deduplicate([str(tmp_path / "rows.jsonl")], tmp_path / "rows.jsonl", rule=EXACT)
