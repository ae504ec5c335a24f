"""The items that go from stage to stage: topics, instructions, conversations.

The id of an item is a hash of its parent and its index there. The id of a row also depends on its words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.ngrams import word_and_sign_tokens


def item_id(*keys: object) -> str:
    """The id of an item: a hash of its parent's id and its index there."""
    return hashlib.sha256("\x1f".join(map(str, keys)).encode()).hexdigest()[:16]


def draw(seed: int, *keys: object) -> float:
    """A number in [0, 1) that depends on the seed and the item alone, not on the other items."""
    return int(item_id(seed, *keys)[:13], 16) / 16**13


def shares(total: int, count: int) -> list[int]:
    """Split `total` into `count` shares that differ by at most one."""
    return [total // count + (index < total % count) for index in range(count)]


def portions(total: int, at_most: int) -> list[int]:
    """Split `total` into as few portions of about equal size as `at_most` allows."""
    return shares(total, -(-total // at_most)) if total > 0 else []


@dataclass(frozen=True)
class Topic:
    """A broad topic of a domain."""

    id: str
    domain: str
    name: str


@dataclass(frozen=True)
class SubTopic:
    """A narrow topic, with concepts that tasks about it can be built on."""

    id: str
    domain: str
    topic: str
    name: str
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """A request of a user to an assistant.

    Attributes:
        origin: `first`, `strong` or `weak` (related to first ones), followed by ` complex` if it was rewritten.
    """

    id: str
    domain: str
    topic: str
    subtopic: str
    text: str
    origin: str


@dataclass(frozen=True)
class Conversation:
    """An instruction with its answer, and further turns if there are any.

    Attributes:
        turns: (user, assistant) pairs.
        tests: Python statements that the code of the last answer must pass. None: the reply had no tests.
    """

    id: str
    instruction: Instruction
    turns: tuple[tuple[str, str], ...]
    tests: str | None = None

    @property
    def domain(self) -> str:
        return self.instruction.domain

    @property
    def answer(self) -> str:
        """The first answer."""
        return self.turns[0][1]

    def row(self, source: str, licence: str) -> Row:
        """The conversation as a row of the data set."""
        messages = tuple(pair for user, assistant in self.turns for pair in (("user", user), ("assistant", assistant)))
        topic, subtopic = self.instruction.topic, self.instruction.subtopic
        return Row(self.id, self.domain, messages, source, licence, topic, subtopic, tests=self.tests)


def history(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns in the form that prompts take."""
    return [{"user": user, "assistant": assistant} for user, assistant in turns]


def plain(text: str) -> str:
    """The words of a text in a normal form, by which equal texts are found."""
    return " ".join(word_and_sign_tokens(text)) or text
