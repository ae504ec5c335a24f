"""Splits: the right number of rows of each domain, no duplicate in two parts, the same whatever the order."""

from __future__ import annotations

import json
import os
import random
from collections import Counter

import pytest

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows, write_rows
from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, connected
from ultrafuser.data.tools.split import assign, split
from ultrafuser.errors import DataError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
EXACT = NearDuplicateRule(threshold=None)


def row(name, question, domain="text"):
    return Row(name, domain, (("user", question), ("assistant", f"The answer to {question}")))


def different(number, domain):
    return [row(f"{domain}-{n}", f"question {domain} {n}", domain) for n in range(number)]


def test_every_part_gets_its_share_of_every_domain():
    rows = different(100, "text") + different(37, "code") + different(5, "math")
    parts = assign(rows, SHARES, likeness=EXACT)
    counts = Counter((one.domain, part) for one, part in zip(rows, parts, strict=True))
    assert [counts["text", part] for part in SHARES] == [80, 10, 10]
    assert [counts["code", part] for part in SHARES] == [29, 4, 4]  # 29.6, 3.7, 3.7: the largest remainders go up
    assert sum(counts["math", part] for part in SHARES) == 5


def test_the_seed_alone_decides_not_the_order():
    rows = different(60, "text") + different(20, "code")
    shuffled = random.Random(3).sample(rows, len(rows))

    def named(rows, seed):
        return {one.id: part for one, part in zip(rows, assign(rows, SHARES, seed=seed, likeness=EXACT), strict=True)}

    assert named(rows, 1) == named(shuffled, 1) != named(rows, 2)


def test_duplicates_are_never_in_two_parts():
    if not os.environ.get("CI"):
        pytest.importorskip("datasketch")
    rng = random.Random(0)
    rows = []
    for n in range(80):
        text = [f"w{rng.randrange(5000)}" for _ in range(30)]
        for k in range(rng.randint(1, 4)):
            changed = [word if n != k else f"v{k}" for n, word in enumerate(text)]
            rows.append(row(f"{n}-{k}", " ".join(changed), rng.choice(["text", "code"])))
    likeness = NearDuplicateRule(0.6)
    groups = connected(rows, likeness)
    assert any(len(group) > 1 for group in groups)
    parts = assign(rows, SHARES, likeness=likeness)
    assert all(len({parts[n] for n in group}) == 1 for group in groups)
    counts = Counter(parts)
    assert counts["train"] == pytest.approx(0.8 * len(rows), abs=3)


def test_a_group_larger_than_a_part_goes_where_there_is_room():
    rows = [row(str(n), "the same question") for n in range(50)] + different(50, "text")
    parts = assign(rows, {"train": 0.9, "test": 0.1}, likeness=EXACT)
    assert set(parts[:50]) == {"train"} and Counter(parts) == {"train": 90, "test": 10}


def test_files_and_report(tmp_path):
    rows = different(20, "text") + different(10, "code")
    write_rows(rows, tmp_path / "rows.jsonl")
    out = tmp_path / "parts"
    report = split([str(tmp_path / "rows.jsonl")], out, {"train": 0.8, "test": 0.2}, likeness=EXACT, kind="parquet")
    assert sorted(file.name for file in out.iterdir()) == ["split.json", "test.parquet", "train.parquet"]
    train, test = load_rows(str(out / "train.parquet")), load_rows(str(out / "test.parquet"))
    assert sorted([*train, *test], key=rows.index) == rows and len(test) == 6
    order = [rows.index(one) for one in train]
    assert order == sorted(order)
    assert report["parts"]["test"] == {"rows": 6, "domains": {"code": 2, "text": 4}}
    assert json.loads((out / "split.json").read_text()) == report


def test_mistakes(tmp_path):
    write_rows(different(3, "text"), tmp_path / "rows.jsonl")
    rows = [str(tmp_path / "rows.jsonl")]
    for shares in ({"train": 1.0}, {"train": 0.9, "test": 0.2}, {"train": 1.5, "test": -0.5}):
        with pytest.raises(DataError, match="expected two or more with positive shares that add up to 1"):
            split(rows, tmp_path / "out", shares, likeness=EXACT)
    with pytest.raises(DataError, match="part 'test' would be empty: 3 rows are too few"):
        split(rows, tmp_path / "out", {"train": 0.9, "test": 0.1}, likeness=EXACT)
    with pytest.raises(DataError, match=r"unknown kind of file '\.txt'"):
        split(rows, tmp_path / "out", {"train": 0.5, "test": 0.5}, likeness=EXACT, kind="txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"test\.jsonl: is there already"):
        split(rows, tmp_path / "out", {"train": 0.5, "test": 0.5}, likeness=EXACT)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["test.jsonl"]
