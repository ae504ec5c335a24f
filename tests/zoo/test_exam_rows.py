"""The rows of the exams that ship with the package: they are what `ultrafuser data exam` gives."""

from __future__ import annotations

import pytest

from ultrafuser.data.sources import load_rows
from ultrafuser.zoo.exams import EXAMS, SPLITS, questions
from ultrafuser.zoo.exams.rows import exam_rows

DEFAULT = {"train": 100, "test": 32}
COUNTS = {"train": {"mixed": 200}, "test": {}}  # where it is another number


@pytest.mark.parametrize("exam", EXAMS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_are_those_of_the_command(exam, split):
    rows = load_rows(f"package:ultrafuser/zoo/exams/data/{exam}.{split}.jsonl")
    assert rows == list(exam_rows(exam, split, COUNTS[split].get(exam, DEFAULT[split]), seed=1))


@pytest.mark.parametrize("exam", EXAMS)
def test_no_row_is_a_question_of_the_exam(exam):
    asked = {question.prompt for question, _ in zip(questions(exam, "test", 0), range(300), strict=False)}
    rows = load_rows(f"package:ultrafuser/zoo/exams/data/{exam}.train.jsonl")
    assert not asked & {row.messages[0][1] for row in rows}
