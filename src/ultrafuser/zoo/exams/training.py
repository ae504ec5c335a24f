"""Exam questions with their checks, to train a gate by right answers (`stages: [outcome]`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ultrafuser.data.answer_text import after_thinking
from ultrafuser.zoo.exams import EXAMS, Question, check
from ultrafuser.zoo.exams import questions as exam_questions


def questions(seed: int) -> dict[str, Iterator[tuple[str, Callable[[str], float]]]]:
    """By exam, prompts of the training split without end, each with the function that says whether an answer is right.

    Args:
        seed: of the questions. Those of the specialists' rows have the seeds below 1,000,000.
    """

    def graded(exam: str) -> Iterator[tuple[str, Callable[[str], float]]]:
        for question in exam_questions(exam, "train", 1_000_000 + seed):
            yield question.prompt, partial(_reward, exam, question)

    return {exam: graded(exam) for exam in EXAMS}


def _reward(exam: str, question: Question, answer: str) -> float:
    return float(check(exam, question, after_thinking(answer)))
