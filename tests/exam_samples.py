"""Questions of one family of an exam, and an estimate of their length."""

from __future__ import annotations

import re
from functools import cache
from random import Random

from ultrafuser.zoo.exams import Question, Split, families


@cache
def sample(exam: str, family: str, split: Split, count: int) -> list[Question]:
    """The first different questions of one family."""
    random = Random(f"test {family} {split}")
    drawn: dict[str, Question] = {}
    for _ in range(200 * count):
        question = families(exam)[family].generate(random, split)
        if question is not None:
            drawn.setdefault(question.prompt, question)
        if len(drawn) == count:
            break
    return list(drawn.values())


def approximate_tokens(text: str) -> int:
    """An upper estimate for SmolLM2, whose tokenizer splits numbers into digits."""
    return len(re.findall(r"[0-9]| (?=[0-9])|\n *| ?[A-Za-z]+| ?[^\sA-Za-z0-9]", text))
