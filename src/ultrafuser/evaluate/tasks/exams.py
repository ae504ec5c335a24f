"""The exams of small models as tasks: their questions are generated, and each answer is right or wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from ultrafuser.data.answer_text import after_thinking
from ultrafuser.zoo.exams import Question, check, questions

if TYPE_CHECKING:
    from datasets import Dataset

NUM_QUESTIONS = 300


def load(exam: str, count: int = NUM_QUESTIONS, seed: int = 0, **_metadata: Any) -> dict[str, Dataset]:
    """The first questions of an exam's test split, in the form of lm-eval's `custom_dataset` hook.

    Args:
        exam: the name of the exam.
        count: the number of questions, in which the families take turns.
        seed: of the questions. The same seed gives the same questions.
        _metadata: other values that lm-eval hands to every task.

    Raises:
        ValueError: an unknown exam.
    """
    from datasets import Dataset

    return {
        "test": Dataset.from_list([_row(exam, question) for question in islice(questions(exam, "test", seed), count)])
    }


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer to one question is right. Programs run in the sandbox.

    Raises:
        SandboxError: there is no sandbox on this machine, or it failed twice.
    """
    return {"acc": float(check(doc["exam"], _question(doc), after_thinking(results[0])))}


def _row(exam: str, question: Question) -> dict[str, str]:
    return {
        "exam": exam,
        "family": question.family,
        "structure": question.structure,
        "question": question.prompt,
        "answer": question.answer,
        "key": json.dumps(question.key),  # as text, since a data set needs the same columns in the keys of all families
    }


def _question(doc: Mapping[str, Any]) -> Question:
    return Question(doc["family"], doc["structure"], doc["question"], doc["answer"], json.loads(doc["key"]))
