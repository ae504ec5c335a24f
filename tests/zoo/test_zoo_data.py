"""Checks of the hand-made conversations in ``ultrafuser/zoo/data``.

The files are read by path, so this module needs neither torch nor the
package itself.  The snippets stored in the rows (``tests`` for code, ``check``
for mathematics) are executed in one child process per file, each row in a
fresh namespace. All failing rows of a file are reported together.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "src" / "ultrafuser" / "zoo" / "data"
DOMAINS = ("text", "code", "math", "mixed")
SPLITS = ("train", "test")
NAMES = [f"{domain}.{split}" for domain in DOMAINS for split in SPLITS]
MINIMUM = {
    "train": {"text": 120, "code": 120, "math": 120, "mixed": 60},
    "test": {"text": 40, "code": 40, "math": 40, "mixed": 40},
}
REQUIRED = ("id", "domain", "messages", "source", "licence", "topic", "subtopic")
OPTIONAL = ("tests", "check")
FENCE = re.compile(r"```[^\n]*\n.*?```", re.DOTALL)

# The program of the child process. It reads rows (one JSON object per line)
# from the file named by its first argument and writes {row id: error} to the second.
RUNNER = r"""
import contextlib, io, json, re, sys, traceback

CODE = re.compile(r"```python[^\n]*\n(.*?)```", re.DOTALL)


def run(row):
    answer = row["messages"][-1]["content"]
    if "tests" in row:
        code = "\n\n".join(CODE.findall(answer))
        if not code.strip():
            raise AssertionError("no python block in the answer")
        space = {"__name__": "zoo_row"}
        exec(compile(code, row["id"], "exec"), space)
        exec(compile(row["tests"], row["id"] + " tests", "exec"), space)
    if "check" in row:
        space = {"__name__": "zoo_row", "answer": answer}
        exec(compile(row["check"], row["id"] + " check", "exec"), space)


failed = {}
with open(sys.argv[1], encoding="utf-8") as lines:
    for line in lines:
        row = json.loads(line)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run(row)
        except (Exception, SystemExit) as err:
            last = traceback.extract_tb(err.__traceback__)[-1]
            failed[row["id"]] = f"{type(err).__name__}: {err} ({last.filename}, line {last.lineno})"
with open(sys.argv[2], "w", encoding="utf-8") as out:
    json.dump(failed, out)
"""


@cache
def load(name: str) -> list[dict]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "", f"{name}: the file must end with a line feed"
    return [json.loads(line) for line in lines]


def answer_of(row: dict) -> str:
    return row["messages"][-1]["content"]


def failing_rows(rows: list[dict], folder: Path) -> dict[str, str]:
    """Execute the snippets of all rows; return the error of each failing row."""
    source, result = folder / "rows.jsonl", folder / "failed.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-c", RUNNER, str(source), str(result)],
        check=True,
        cwd=folder,
        timeout=300,
    )
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_well_formed(name: str) -> None:
    domain, split = name.split(".")
    bad = []
    for line, row in enumerate(load(name), 1):
        keys, messages = set(row), row.get("messages", [])
        good = (
            keys >= set(REQUIRED)
            and keys <= {*REQUIRED, *OPTIONAL}
            and all(isinstance(row[k], str) and row[k].strip() for k in keys - {"messages"})
            and row["domain"] == domain
            and re.fullmatch(rf"{domain}-{split}-\d{{3}}", row["id"])
            and len(messages) >= 2
            and len(messages) % 2 == 0
            and [m.get("role") for m in messages] == ["user", "assistant"] * (len(messages) // 2)
            and all(set(m) == {"role", "content"} and m["content"].strip() for m in messages)
        )
        if not good:
            bad.append(row.get("id", f"line {line}"))
    assert not bad, f"{name}: malformed rows {bad}"


@pytest.mark.parametrize("name", NAMES)
def test_there_are_enough_rows(name: str) -> None:
    domain, split = name.split(".")
    assert len(load(name)) >= MINIMUM[split][domain]


def test_ids_are_unique() -> None:
    ids = [row["id"] for name in NAMES for row in load(name)]
    repeated = sorted({i for i in ids if ids.count(i) > 1})
    assert not repeated, f"repeated ids: {repeated}"


def test_no_instruction_occurs_twice() -> None:
    seen = defaultdict(list)
    for name in NAMES:
        for row in load(name):
            first = row["messages"][0]["content"]
            seen[" ".join(re.findall(r"\S+", first.lower()))].append(row["id"])
    repeated = [ids for ids in seen.values() if len(ids) > 1]
    assert not repeated, f"same instruction in rows {repeated}"


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_short(name: str) -> None:
    assert statistics.median(len(answer_of(row).split()) for row in load(name)) < 120


@pytest.mark.parametrize("split", SPLITS)
def test_code_rows_carry_assertions(split: str) -> None:
    def assertions(row: dict) -> int:
        tree = ast.parse(row.get("tests", ""))
        return sum(isinstance(node, ast.Assert) for node in ast.walk(tree))

    weak = [row["id"] for row in load(f"code.{split}") if assertions(row) < 2]
    assert not weak, f"fewer than two assertions: {weak}"


@pytest.mark.parametrize("split", SPLITS)
def test_math_rows_carry_a_check(split: str) -> None:
    missing = [row["id"] for row in load(f"math.{split}") if "check" not in row]
    assert not missing, f"rows without a check: {missing}"


@pytest.mark.parametrize("name", NAMES)
def test_stored_snippets_pass(name: str, tmp_path: Path) -> None:
    rows = [row for row in load(name) if "tests" in row or "check" in row]
    if rows:
        failed = failing_rows(rows, tmp_path)
        assert not failed, f"{name}: {len(failed)} failing rows: {json.dumps(failed, indent=1)}"


@pytest.mark.parametrize("split", SPLITS)
def test_mixed_answers_hold_prose_code_and_mathematics(split: str) -> None:
    bad = {}
    for row in load(f"mixed.{split}"):
        prose = FENCE.sub(" ", answer_of(row))
        lacking = []
        if len(re.findall(r"[A-Za-z]{2,}", prose)) < 8:
            lacking.append("prose")
        if not FENCE.search(answer_of(row)):
            lacking.append("code block")
        if not re.search(r"[^=<>!]=[^=]|\d", prose):
            lacking.append("mathematics")
        if lacking:
            bad[row["id"]] = lacking
    assert not bad, f"incomplete mixed answers: {bad}"


def test_runner_notices_wrong_answers(tmp_path: Path) -> None:
    def changed(row: dict, suffix: str, content: str) -> dict:
        message = {"role": "assistant", "content": content}
        return {**row, "id": row["id"] + suffix, "messages": row["messages"][:-1] + [message]}

    code, math = load("code.train")[0], load("math.train")[0]
    wrong_code, count = re.subn(r"\breturn\b[^\n]*", "return 'wrong'", answer_of(code))
    assert count, "the first code row has no return statement to spoil"
    rows = [
        code,
        math,
        changed(code, "-wrong", wrong_code),
        changed(code, "-syntax", "```python\ndef broken(:\n```"),
        changed(code, "-empty", "There is no code here."),
        changed(math, "-wrong", "The answer is -987654321."),
        {**code, "id": code["id"] + "-exit", "tests": "raise SystemExit(0)"},
    ]
    failed = failing_rows(rows, tmp_path)
    assert set(failed) == {row["id"] for row in rows[2:]}
