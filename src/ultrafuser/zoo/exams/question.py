"""One question of an exam, the families that make them, and what keeps the training split and the test split apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
TEST_SHARE = 4  # one structure in so many belongs to the test split


@dataclass(frozen=True)
class Question:
    """A question with an answer that is right.

    Attributes:
        family: the name of the family that made it.
        structure: what a model would have to know by heart to answer without the skill, such as the composition of
            operations, the words, or the length of a chain. No structure occurs in both splits.
        prompt: the message of the user.
        answer: a right answer, in the form that specialists learn.
        key: what the checker needs, as JSON values.
    """

    family: str
    structure: str
    prompt: str
    answer: str
    key: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Questions of one kind.

    Attributes:
        name: of the family, in lower case with hyphens.
        generate: a question of a split, from a source of random numbers. It returns None where the draw belongs to the
            other split, and is then called again.
        check: whether a response to a question is right, by computing or running.
    """

    name: str
    generate: Callable[[Random, Split], Question | None]
    check: Callable[[Question, str], bool]


def split_of(structure: str) -> Split:
    """The split that a structure belongs to: the same in every process and version of Python."""
    return "test" if zlib.crc32(structure.encode()) % TEST_SHARE == 0 else "train"
