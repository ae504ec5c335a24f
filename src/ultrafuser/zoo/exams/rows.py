"""Questions of an exam as rows of training data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from ultrafuser.data.schema import Row
from ultrafuser.zoo.exams import Split, questions


def exam_rows(exam: str, split: Split, count: int, seed: int = 0) -> Iterator[Row]:
    """`count` questions as conversations. A row's topic is the question's family, its subtopic the structure.

    Raises:
        ValueError: an unknown exam.
    """
    for index, question in enumerate(islice(questions(exam, split, seed), count)):
        yield Row(
            id=f"exam-{exam}-{split}-{seed}-{index}",
            domain=exam,
            messages=(("user", question.prompt), ("assistant", question.answer)),
            source=f"exam-{exam}",
            licence="Apache-2.0",
            topic=question.family,
            subtopic=question.structure,
        )
