"""What goes from stage to stage: topics, instructions, conversations. Ids come from the parent and the place, those of rows also from their words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.ngrams import word_and_sign_tokens


def item_id(*parts: object) -> str:
    """The name of an item: a hash of its parent's id and its place."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def draw(seed: int, *parts: object) -> float:
    """A number in [0, 1) that depends on the seed and the item alone, not on what else there is."""
    return int(item_id(seed, *parts)[:13], 16) / 16**13


def shares(total: int, number: int) -> list[int]:
    """`total` in `number` parts that differ by one at most."""
    return [total // number + (place < total % number) for place in range(number)]


def portions(total: int, at_most: int) -> list[int]:
    """`total` in as few parts as `at_most` allows, of about equal size."""
    return shares(total, -(-total // at_most)) if total > 0 else []


@dataclass(frozen=True)
class Topic:
    """A broad topic of a domain."""

    id: str
    domain: str
    name: str


@dataclass(frozen=True)
class SubTopic:
    """A narrow topic, with what tasks about it could turn on."""

    id: str
    domain: str
    topic: str
    name: str
    concepts: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """What a person asks.

    Attributes:
        origin: `first`, `strong` or `weak` (related to first ones), with ` complex` after it where it was rewritten.
    """

    id: str
    domain: str
    topic: str
    subtopic: str
    text: str
    origin: str


@dataclass(frozen=True)
class Conversation:
    """An instruction with its answer, perhaps with further turns.

    Attributes:
        turns: (user, assistant) pairs.
        tests: Python statements that the last answer's code must pass, if its reply brought any.
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
        """The row of the data set."""
        messages = tuple(pair for user, assistant in self.turns for pair in (("user", user), ("assistant", assistant)))
        return Row(self.id, self.domain, messages, source, licence, self.instruction.topic, self.instruction.subtopic,
                   tests=self.tests)  # fmt: skip


def history(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Turns as prompts take them."""
    return [{"user": user, "assistant": assistant} for user, assistant in turns]


def plain(text: str) -> str:
    """What two texts that say the same have in common."""
    return " ".join(word_and_sign_tokens(text)) or text
