"""The rows of the tasks: local files, hub columns, and rows that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from task_rows import AQUA, FILES, GSM8K, HUMANEVAL, MATH, MBPP, SAT_MATH, TRUTHFULQA, write_files
from ultrafuser.errors import DataError
from ultrafuser.evaluate.tasks import TASKS, sources

SETS = [name for name in TASKS if TASKS[name].file and not name.endswith("_cot")]
ROWS = {name: FILES[TASKS[name].file] for name in SETS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def read(task: str, folder: Path | None) -> list[dict[str, Any]]:
    return list(sources.load(task, data_dir=None if folder is None else str(folder), version=1.0)["test"])


def test_local_rows(folder):
    assert read("truthfulqa", folder)[0] == {
        "question": "Is the sea salty?",
        "options": ["Yes.", "No.", "It is."],
        "labels": [1, 0, 1],
    }
    assert [row["answer"] for row in read("gsm8k", folder)] == ["1200", "-2"]
    assert read("math", folder)[0] == {
        "question": "What is $\\frac{1}{2}+\\frac{1}{4}$?",
        "answer": "\\frac{3}{4}",
        "subject": "Prealgebra",
        "level": "Level 1",
    }
    assert read("aqua", folder)[1] == {
        "question": "Twice 2?",
        "options": ["1", "2", "3", "5", "4"],
        "choices": ["(A)", "(B)", "(C)", "(D)", "(E)"],
        "target": 4,
    }
    assert [row["setup"] for row in read("humaneval", folder)] == [
        "from typing import List",
        "def double(x: int):\n    return 2 * x",
    ]
    assert [(row["entry_point"], row["setup"]) for row in read("mbpp", folder)] == [
        ("square", ""),
        ("half", "import math"),
    ]


# ---------------------------------------------------------------- the hub

HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "truthfulqa": [
        {
            "question": row["question"],
            "mc1_targets": {"choices": [], "labels": []},
            "mc2_targets": {"choices": list(row["mc2_targets"]), "labels": list(row["mc2_targets"].values())},
        }
        for row in TRUTHFULQA
    ],
    "humaneval": [row | {"instruction_noexamples": ""} for row in HUMANEVAL],
    "mbpp": MBPP,
    "gsm8k": GSM8K,
    "math": [row | {"unique_id": "test/1", "level": int(row["level"][-1])} for row in MATH],
    "sat_math": [
        {
            "query": f"Q: {' '.join([row['passage'], row['question']]).strip()} Answer Choices: {' '.join(row['options'])}\n"
            "A: Among A through D, the answer is",
            "choices": row["options"],
            "gold": ["ABCD".index(row["label"])],
        }
        for row in SAT_MATH
    ],
    "aqua": AQUA,
}


@pytest.mark.parametrize("task", SETS)
def test_hub_rows_become_the_same_rows(folder, monkeypatch, task):
    import datasets

    requests = []

    def load_dataset(*args, **kwargs):
        requests.append((args, kwargs["split"]))
        return HUB_ROWS[task]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, expected = read(task, None), read(task, folder)
    hub = TASKS[task].hub
    assert requests == [((hub.id, hub.config), hub.split)]
    if task == "math":
        assert [row.pop("level") for row in rows] == ["1", "2"]
        expected = [{key: value for key, value in row.items() if key != "level"} for row in expected]
    if task == "sat_math":  # a passage is part of the query there
        expected[1]["question"] = expected[1]["question"].replace("\n\n", " ")
    assert rows == expected


def test_the_sanitised_mbpp_layout(tmp_path):
    row = {
        "source_file": "x",
        "task_id": 511,
        "prompt": "Write a function to halve a number.",
        "code": "def half(x):\n    return x / 2",
        "test_imports": ["import math", "import os"],
        "test_list": ["assert math.isclose(half(3), 1.5)"],
    }
    (tmp_path / "mbpp_validation.jsonl").write_text(json.dumps(row))
    (loaded,) = read("mbpp", tmp_path)
    assert (loaded["instruction"], loaded["setup"]) == (row["prompt"], "import math\nimport os")


def test_a_hub_that_cannot_be_reached_names_the_file_to_use(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"task 'gsm8k': openai/gsm8k: .*no route to host\. .*gsm8k_test.jsonl.*--data-dir"
    ):
        read("gsm8k", None)


# ---------------------------------------------------------------- what can be wrong


def test_a_missing_file_and_a_missing_folder(tmp_path):
    with pytest.raises(
        DataError, match=r"task 'gsm8k': no gsm8k_test.jsonl in .*\. .*leave out --data-dir .*openai/gsm8k"
    ):
        read("gsm8k", tmp_path)
    with pytest.raises(DataError, match=r"task 'aqua': no folder .*none"):
        read("aqua", tmp_path / "none")


def test_an_empty_file(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text("")
    with pytest.raises(DataError, match="task 'gsm8k': no rows in"):
        read("gsm8k", tmp_path)


@pytest.mark.parametrize("task", [name for name in SETS if name != "truthfulqa"])
def test_a_line_that_is_not_json_is_named_with_its_number(folder, task):
    file = folder / TASKS[task].file
    file.write_text(file.read_text() + "{'no': json}\n")
    with pytest.raises(DataError, match=rf"{file.name}:3: not JSON"):
        read(task, folder)
    file.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=rf"{file.name}:1: task '{task}': expected a JSON object, got list"):
        read(task, folder)


@pytest.mark.parametrize(
    ("task", "changes", "problem"),
    [
        ("gsm8k", {"answer": None}, "column 'answer': expected text, got nothing"),
        ("gsm8k", {"answer": "eighteen"}, "column 'answer': expected a solution that ends with '#### NUMBER'"),
        ("gsm8k", {"question": 5}, "column 'question': expected text, got int"),
        ("gsm8k", {"question": "  "}, "column 'question': expected text, got nothing"),
        ("gsm8k", {"question": "what \ud83d ?"}, "holds a lone surrogate, half of a character"),
        ("truthfulqa", {"mc2_targets": {"Y\udc00": 1}}, "holds a lone surrogate"),
        ("mbpp", {"test_list": ["assert f('\ud83d')"]}, "holds a lone surrogate"),
        ("math", {"problem": ...}, "no column 'problem'. It has 'solution', 'answer', 'subject', 'level'"),
        ("aqua", {"options": []}, "column 'options': expected a list of texts, at least one"),
        (
            "aqua",
            {"options": ["A)1", "C)2"]},
            r"column 'options': expected up to 8 labelled \(A\), \(B\), ... in order",
        ),
        ("aqua", {"options": ["x"] * 9}, "column 'options': expected up to 8"),
        ("aqua", {"options": "A)1"}, "column 'options': expected a list of texts, got str"),
        ("aqua", {"correct": "F"}, "column 'correct': expected one of A, B, C, D, E, got 'F'"),
        ("sat_math", {"label": "AB"}, "column 'label': expected one of A, B, C, D, got 'AB'"),
        (
            "humaneval",
            {"context": "import os"},
            "column 'context': expected code that ends with a function's signature",
        ),
        ("humaneval", {"test": ...}, "no column 'test'"),
        ("mbpp", {"test_list": ["assert other(1)"]}, "column 'test_list': no test calls a function of 'code'"),
        ("mbpp", {"code": "def ("}, "columns 'code' and 'test_list': not Python"),
        ("truthfulqa", {"mc2_targets": {"Yes.": 0}}, "column 'mc2_targets': expected {answer: 0 or 1}"),
        ("truthfulqa", {"mc2_targets": {"Yes.": 2}}, "column 'mc2_targets': expected {answer: 0 or 1}"),
        ("truthfulqa", {"mc2_targets": ["Yes."]}, "column 'mc2_targets': expected an object, got list"),
    ],
)
def test_a_row_with_a_wrong_column_is_named_with_its_place(tmp_path, task, changes, problem):
    good, info = ROWS[task][0], TASKS[task]
    bad = {key: value for key, value in (good | changes).items() if value is not ...}
    rows = [good, bad]
    text = json.dumps(rows) if info.file.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / info.file).write_text(text)
    location = rf"{info.file}\[1\]" if info.file.endswith(".json") else f"{info.file}:2"
    with pytest.raises(DataError, match=f"{location}: task '{task}': {problem}"):
        read(task, tmp_path)
