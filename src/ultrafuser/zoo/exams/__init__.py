"""Exams that a model of 135M parameters can pass: text, code, math, and questions that need all three.

They are no benchmarks of intelligence. Each is a set of families of small tasks whose questions are generated, without
limit and from a seed, and whose answers are checked by computing or running. So they show who has a skill and who has not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from random import Random

from ultrafuser.zoo.exams.question import SPLITS, Family, Question, Split, split_of

__all__ = [
    "EXAMS", "MAX_NEW_TOKENS", "SPLITS", "Family", "Question", "Split", "check", "families", "questions", "split_of",
]  # fmt: skip

EXAMS = ("text", "code", "math", "mixed")
MAX_NEW_TOKENS = {"text": 64, "code": 128, "math": 144, "mixed": 160}  # longer than any right answer that we write
_MAX_DRAWS = 10_000  # for one question


def families(exam: str) -> dict[str, Family]:
    """The families of an exam by their names.

    Raises:
        ValueError: an unknown exam.
    """
    if exam not in EXAMS:
        raise ValueError(f"unknown exam {exam!r}. Expected one of {', '.join(EXAMS)}")
    module = importlib.import_module(f"ultrafuser.zoo.exams.{exam}_exam")
    return {family.name: family for family in module.FAMILIES}


def questions(exam: str, split: Split, seed: int = 0) -> Iterator[Question]:
    """Questions without end and without repetition: one of each family in turn.

    The same exam, split and seed give the same questions. Test questions have structures that no training question has.
    """
    exam_families = families(exam).values()
    random = Random(f"{exam}/{split}/{seed}")
    seen: set[str] = set()
    while True:
        for family in exam_families:
            for _ in range(_MAX_DRAWS):
                question = family.generate(random, split)
                if question is not None and question.prompt not in seen:
                    break
            else:
                raise RuntimeError(f"exam {exam!r}: {_MAX_DRAWS} draws gave no new question of family {family.name!r}")
            seen.add(question.prompt)
            yield question


def check(exam: str, question: Question, response: str) -> bool:
    """Whether the response to a question is right."""
    return families(exam)[question.family].check(question, response)
