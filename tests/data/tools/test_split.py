"""Splits: exact counts of each domain, no duplicates across splits, the same result for every order of the rows."""

from __future__ import annotations

import json
import os
import random
from collections import Counter

import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, find_groups
from ultrafuser.data.tools.split import assign, split
from ultrafuser.errors import DataError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
EXACT = NearDuplicateRule(threshold=None)


def row(name, question, domain="text"):
    return Row(name, domain, (("user", question), ("assistant", f"The answer to {question}")))


def different(count, domain):
    return [row(f"{domain}-{n}", f"question {domain} {n}", domain) for n in range(count)]


def test_every_split_gets_its_share_of_every_domain():
    rows = different(100, "text") + different(37, "code") + different(5, "math")
    names = assign(rows, SHARES, rule=EXACT)
    counts = Counter((row.domain, name) for row, name in zip(rows, names, strict=True))
    assert [counts["text", name] for name in SHARES] == [80, 10, 10]
    assert [counts["code", name] for name in SHARES] == [29, 4, 4]  # 29.6, 3.7, 3.7: the largest remainders go up
    assert sum(counts["math", name] for name in SHARES) == 5


def test_the_split_depends_on_the_seed_not_on_the_order():
    rows = different(60, "text") + different(20, "code")
    shuffled = random.Random(3).sample(rows, len(rows))

    def by_id(rows, seed):
        return {row.id: name for row, name in zip(rows, assign(rows, SHARES, seed=seed, rule=EXACT), strict=True)}

    assert by_id(rows, 1) == by_id(shuffled, 1) != by_id(rows, 2)


def test_duplicates_are_never_in_two_splits():
    if not os.environ.get("CI"):
        pytest.importorskip("datasketch")
    rng = random.Random(0)
    rows = []
    for n in range(80):
        text = [f"w{rng.randrange(5000)}" for _ in range(30)]
        for k in range(rng.randint(1, 4)):
            changed = [word if n != k else f"v{k}" for n, word in enumerate(text)]
            rows.append(row(f"{n}-{k}", " ".join(changed), rng.choice(["text", "code"])))
    rule = NearDuplicateRule(0.6)
    groups = find_groups(rows, rule)
    assert any(len(group) > 1 for group in groups)
    names = assign(rows, SHARES, rule=rule)
    assert all(len({names[n] for n in group}) == 1 for group in groups)
    counts = Counter(names)
    assert counts["train"] == pytest.approx(0.8 * len(rows), abs=3)


def test_a_group_larger_than_a_split_goes_to_a_larger_one():
    rows = [row(str(n), "the same question") for n in range(50)] + different(50, "text")
    names = assign(rows, {"train": 0.9, "test": 0.1}, rule=EXACT)
    assert set(names[:50]) == {"train"} and Counter(names) == {"train": 90, "test": 10}


def test_files_and_report(tmp_path):
    rows = different(20, "text") + different(10, "code")
    write_rows(rows, tmp_path / "rows.jsonl")
    out = tmp_path / "splits"
    report = split([str(tmp_path / "rows.jsonl")], out, {"train": 0.8, "test": 0.2}, rule=EXACT, kind="parquet")
    assert sorted(file.name for file in out.iterdir()) == ["split.json", "test.parquet", "train.parquet"]
    train, test = load_rows(str(out / "train.parquet")), load_rows(str(out / "test.parquet"))
    assert sorted([*train, *test], key=rows.index) == rows and len(test) == 6
    order = [rows.index(row) for row in train]
    assert order == sorted(order)
    assert report["parts"]["test"] == {"rows": 6, "domains": {"code": 2, "text": 4}}
    assert json.loads((out / "split.json").read_text()) == report


def test_mistakes(tmp_path):
    write_rows(different(3, "text"), tmp_path / "rows.jsonl")
    rows = [str(tmp_path / "rows.jsonl")]
    for shares in ({"train": 1.0}, {"train": 0.9, "test": 0.2}, {"train": 1.5, "test": -0.5}):
        with pytest.raises(DataError, match="expected two or more with positive shares that add up to 1"):
            split(rows, tmp_path / "out", shares, rule=EXACT)
    with pytest.raises(DataError, match="part 'test' would be empty: 3 rows are too few"):
        split(rows, tmp_path / "out", {"train": 0.9, "test": 0.1}, rule=EXACT)
    with pytest.raises(DataError, match=r"unknown file type '\.txt'"):
        split(rows, tmp_path / "out", {"train": 0.5, "test": 0.5}, rule=EXACT, kind="txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"test\.jsonl: exists"):
        split(rows, tmp_path / "out", {"train": 0.5, "test": 0.5}, rule=EXACT)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["test.jsonl"]
