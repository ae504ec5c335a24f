"""The rows of every task that has a file, from there or the hub, checked and in the columns that the task files use."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.data.json_text import LONE_SURROGATE, has_lone_surrogate
from ultrafuser.data.records import read_records
from ultrafuser.errors import DataError
from ultrafuser.evaluate.tasks import TASKS, TaskInfo
from ultrafuser.evaluate.tasks.choices import LETTERS, split_label

if TYPE_CHECKING:
    from datasets import Dataset


def load(task: str, data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """The rows of a task, in the form of lm-eval's `custom_dataset` hook.

    Args:
        task: the short name of one of our tasks with a file.
        data_dir: the folder with its file. None: load it from the hub.
        _metadata: other values that lm-eval hands to every task.

    Raises:
        DataError: no such folder or file, nothing from the hub, or a malformed row (with file and line).
    """
    from datasets import Dataset

    info = TASKS[task]
    assert info.hub is not None  # exams.py makes the rows of the other tasks
    rows = [_MAKERS[task](_Record(raw, location, task)) for raw, location in _read(info, data_dir)]
    if not rows:
        raise DataError(
            f"task {task!r}: no rows in {data_dir or info.hub.id}. Expected one JSON object for each question"
        )
    return {"test": Dataset.from_list(rows)}


def _read(info: TaskInfo, data_dir: str | None) -> Iterator[tuple[Any, str]]:
    """The records of the local file, or of the hub in the layout of that file, each with its location."""
    assert info.file is not None and info.hub is not None
    if data_dir is not None:
        file = Path(data_dir).expanduser() / info.file
        if not file.is_file():
            why = f"no {info.file} in {file.parent}" if file.parent.is_dir() else f"no folder {file.parent}"
            raise DataError(
                f"task {info.name!r}: {why}. Put the file there (docs/tasks.md has its layout), or leave out --data-dir "
                f"to load {info.hub.id} from the hub"
            )
        yield from read_records(str(file))
        return
    try:
        for raw, location in read_records(info.hub.id, info.hub.split, config=info.hub.config):
            yield _FROM_HUB.get(info.name, dict)(raw), location
    except DataError as error:
        raise DataError(
            f"task {info.name!r}: {error}. To use a local {info.file}, give its folder as --data-dir"
        ) from error


class _Record:
    """A raw record whose columns are checked when they are read."""

    def __init__(self, raw: Any, location: str, task: str) -> None:
        self._location = f"{location}: task {task!r}"
        if not isinstance(raw, Mapping):
            raise DataError(f"{self._location}: expected a JSON object, got {type(raw).__name__}")
        if has_lone_surrogate(raw):
            raise self.fail(f"{LONE_SURROGATE}. Fix the row")
        self.raw = raw

    def fail(self, problem: str) -> DataError:
        return DataError(f"{self._location}: {problem}")

    def text(self, column: str) -> str:
        return self.get(column, str, "text")

    def optional(self, column: str) -> str:
        """An optional column as text. Empty if it is missing."""
        return str(self.raw.get(column) or "")

    def texts(self, column: str) -> list[str]:
        texts = self.get(column, list, "a list of texts")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise self.fail(f"column {column!r}: expected a list of texts, at least one, got {str(texts)[:60]}")
        return texts

    def get(self, column: str, kind: type, description: str) -> Any:
        if column not in self.raw:
            raise self.fail(f"no column {column!r}. It has {', '.join(map(repr, self.raw)) or 'none'}")
        value = self.raw[column]
        empty = value is None or (isinstance(value, str) and not value.strip())
        if empty or not isinstance(value, kind):
            got = "nothing" if empty else type(value).__name__
            raise self.fail(f"column {column!r}: expected {description}, got {got}")
        return value


# ---------------------------------------------------------------- the rows of each task


def _truthfulqa(record: _Record) -> dict[str, Any]:
    targets = record.get("mc2_targets", dict, "an object")
    if not all(label in (0, 1) for label in targets.values()) or 1 not in targets.values():
        raise record.fail("column 'mc2_targets': expected {answer: 0 or 1}, at least one of them 1")
    labels = [int(label) for label in targets.values()]
    return {"question": record.text("question"), "options": list(targets), "labels": labels}


def _humaneval(record: _Record) -> dict[str, Any]:
    columns = ("task_id", "instruction", "context", "test", "entry_point")
    row = {column: record.text(column) for column in columns}
    lines = row["context"].rstrip().split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(("def ", "async def "))]
    if not starts:
        raise record.fail(
            f"column 'context': expected code that ends with a function's signature, got {row['context'][-60:]!r}"
        )
    row["setup"] = "\n".join(lines[: starts[-1]]).strip()  # imports and helpers above the signature to be filled in
    return row | {"reference": record.text("prompt") + record.text("canonical_solution")}


def _mbpp(record: _Record) -> dict[str, Any]:
    instruction = record.text("text" if "text" in record.raw else "prompt")  # the sanitised set has "prompt"
    imports = record.texts("test_imports") if record.optional("test_imports") else []
    reference, tests = record.text("code").replace("\r\n", "\n"), "\n".join(record.texts("test_list"))
    return {
        "task_id": record.optional("task_id"),
        "instruction": instruction.strip(),
        "tests": tests,
        "setup": record.optional("test_setup_code") or "\n".join(imports),
        "entry_point": _tested_function(record, reference, tests),
        "reference": reference,
    }


def _tested_function(record: _Record, reference: str, tests: str) -> str:
    """The name of the function or class that the reference defines and the tests call."""
    try:
        defined = [node.name for node in ast.parse(reference).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        called = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise record.fail(f"columns 'code' and 'test_list': not Python: {error.msg}") from error
    tested = [name for name in defined if name in called and not hasattr(builtins, name)]
    if not tested:
        raise record.fail("column 'test_list': no test calls a function of 'code'")
    return tested[-1]


def _gsm8k(record: _Record) -> dict[str, Any]:
    answer = record.text("answer")
    if "####" not in answer:
        raise record.fail("column 'answer': expected a solution that ends with '#### NUMBER'")
    return {"question": record.text("question"), "answer": answer.rsplit("####", 1)[1].strip().replace(",", "")}


def _math(record: _Record) -> dict[str, Any]:
    row = {"question": record.text("problem"), "answer": record.text("answer")}
    return row | {"subject": record.optional("subject"), "level": record.optional("level")}


def _sat_math(record: _Record) -> dict[str, Any]:
    passage = record.optional("passage").strip()
    question = f"{passage}\n\n{record.text('question')}" if passage else record.text("question")
    return _choices(record, question, "label")


def _choices(record: _Record, question: str, column: str) -> dict[str, Any]:
    options = [split_label(option) for option in record.texts("options")]
    letters, right = LETTERS[: len(options)], record.text(column)
    labels = [label or letter for (label, _), letter in zip(options, letters, strict=False)]
    if len(options) > len(LETTERS) or labels != list(letters):
        raise record.fail(f"column 'options': expected up to {len(LETTERS)} labelled (A), (B), ... in order")
    if right not in letters or len(right) != 1:
        raise record.fail(f"column {column!r}: expected one of {', '.join(letters)}, got {right!r}")
    return {
        "question": question.strip(),
        "options": [text for _, text in options],
        "choices": [f"({letter})" for letter in letters],
        "target": letters.index(right),
    }


_MAKERS: dict[str, Callable[[_Record], dict[str, Any]]] = {
    "truthfulqa": _truthfulqa,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "gsm8k": _gsm8k,
    "math": _math,
    "sat_math": _sat_math,
    "aqua": lambda record: _choices(record, record.text("question"), "correct"),
}


# ---------------------------------------------------------------- hub columns -> the layout of the local files


def _truthfulqa_from_hub(raw: Mapping[str, Any]) -> dict[str, Any]:
    targets = raw["mc2_targets"]
    return {"question": raw["question"], "mc2_targets": dict(zip(targets["choices"], targets["labels"], strict=True))}


def _sat_math_from_hub(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`query` is a whole prompt: "Q: ... Answer Choices: (A)... A: Among A through D, the answer is"."""
    question = raw["query"].removeprefix("Q:").split("Answer Choices:", 1)[0]
    return {"question": question.strip(), "options": raw["choices"], "label": LETTERS[raw["gold"][0]]}


_FROM_HUB: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "truthfulqa": _truthfulqa_from_hub,
    "sat_math": _sat_math_from_hub,
}
